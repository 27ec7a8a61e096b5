"""What asking blocks attend to in the upper layers of one dense pass, which predictors learn.

It is the mean of the shares (`oracle_shares`) of the upper half of the layers, in which each asking
block of each layer has one unit. It finds more of the blocks that answers need than one layer, or
all layers (docs/LOG.md).
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo_hf.config import LeMoConfig
from lemo_hf.core.loss import shifted
from lemo_hf.core.observe import observe
from lemo_hf.core.policies import ScoreInputs, oracle_shares, sublayer_input
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.predictors.rarity import rarity

# Token ids, or what a trainer's dataset holds: ``input_ids`` and, if a part has any, ``labels``.
Row = Sequence[int] | Mapping[str, Sequence[int]]


class LookedAt:
    """One dense pass: the asking blocks, what they attend to from some layer on, and the streams.

    Args:
        model: Model as for `observe`.
        config: Settings, of which the block size counts.
        batch: Mapping with ``input_ids``, ``targets`` and ``attention_mask`` or None, as `collate`
            makes it.
        layers: Layers whose ``streams`` are kept.
        asking: Greatest number of asking blocks of a row; None: all.
        seeds: Seed of the draw, one for each row.

    Attributes:
        index, asks: Asking blocks, as `asking_index` gives them.
        rare: `rarity` of the tokens, ``[B, T]``.
        streams: Stream before each of ``layers``, by layer.
        target: Mean shares of the upper half of the layers, ``[B, M, N]`` fp32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: LeMoConfig,
        batch: dict[str, Tensor | None],
        layers: Sequence[int],
        asking: int | None = None,
        seeds: Sequence[int] | None = None,
    ):
        self.streams: dict[int, ScoreInputs] = {}
        self.index = self.asks = self.target = torch.empty(0)
        lowest = model.config.get_text_config().num_hidden_layers // 2
        ids = cast(Tensor, batch["input_ids"])
        mask = batch["attention_mask"]
        self.rare = rarity(ids, None if mask is None else mask.bool())

        def see(inputs: ScoreInputs) -> None:
            layer = inputs.layer_index
            if layer == 0:
                sparse_pass = inputs.sparse_pass
                self.index, self.asks = _draw(sparse_pass.asking_blocks, asking, seeds)
                asked = torch.zeros_like(sparse_pass.asking_blocks)
                sparse_pass.asking_blocks = asked.scatter_(1, self.index, self.asks)
            if layer in layers:
                self.streams[layer] = inputs
            if layer < lowest:
                return
            shares = torch.cat(list(oracle_shares(inputs, self.index, self.asks)), 1)
            mean = shares if layer == lowest else self.target
            self.target = mean + (shares - mean) / (layer - lowest + 1)

        observe(
            model,
            config,
            ids,
            see,
            attention_mask=mask,
            targets=batch["targets"],
        )

    def rows(self, layer: int) -> Tensor:
        """Input of the attention of ``layer``, ``[B, T, H]``."""
        return sublayer_input(self.streams[layer], self.streams[layer].x)


def _draw(asking: Tensor, most: int | None, seeds: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Draw at most ``asking`` of the asking blocks, as of `asking_index`; each row has its own
    draw."""
    device, asking = asking.device, asking.cpu()
    most = min(int(asking.sum(1).max()), most or asking.shape[1])
    chance = torch.stack(
        [
            torch.rand(asking.shape[1], generator=torch.Generator().manual_seed(seed))
            for seed in seeds or range(len(asking))
        ]
    )
    index = chance.masked_fill(~asking, -1).topk(most, 1).indices.sort(1).values
    return index.to(device), asking.gather(1, index).to(device)


def length(row: Row) -> int:
    """Number of tokens of a row."""
    return len(row["input_ids"] if isinstance(row, Mapping) else row)


def collate(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor | None]:
    """A batch of rows: ``input_ids [B, T]``, ``targets [B, T]`` of the next tokens, and
    ``attention_mask [B, T]``, or None if no row is padded (on its right)."""
    pairs = [row if isinstance(row, Mapping) else {"input_ids": row} for row in rows]
    ids = [torch.as_tensor(pair["input_ids"]).long() for pair in pairs]
    labels = [torch.as_tensor(pair.get("labels", pair["input_ids"])).long() for pair in pairs]
    longest = max(map(len, ids))

    def padded(tensors: list[Tensor], value: int) -> Tensor:
        return torch.stack(
            [nn.functional.pad(t, (0, longest - len(t)), value=value) for t in tensors]
        ).to(device)

    mask = None
    if min(map(len, ids)) < longest:
        mask = padded([torch.ones_like(t) for t in ids], 0)
    return {
        "input_ids": padded(ids, 0),
        "targets": shifted(padded(labels, IGNORE_INDEX)),
        "attention_mask": mask,
    }
