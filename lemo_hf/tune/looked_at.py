"""What the blocks that ask look at, over the upper layers of one dense pass: what predictors learn.

That is the mean of the upper half's shares (`oracle_shares`), each asking block of each layer
having one unit: it finds more of the blocks that answers need than one layer, or all (docs/LOG.md).
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
    """One dense pass: what blocks ask, what they look at from some layers on, and the streams.

    Args:
        model: As of `observe`.
        config: Its block size counts.
        batch: ``input_ids``, ``targets`` and ``attention_mask`` or None, as `collate` makes them.
        layers: Whose ``streams`` are kept.
        asking: Blocks a row that ask, at most; None: all that may.
        seeds: One a row, of the draw.

    Attributes:
        index, asks: Of the blocks that ask, as of `asking_index`.
        rare: ``[B, T]``, `rarity` of the tokens.
        streams: By layer.
        target: ``[B, M, N]`` fp32: mean shares of the upper half of the layers.
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
        """What the attention of ``layer`` reads, ``[B, T, H]``."""
        return sublayer_input(self.streams[layer], self.streams[layer].x)


def _draw(asking: Tensor, most: int | None, seeds: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """At most so many of the blocks that ask, as of `asking_index`; a row's draw is its own."""
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
    """Tokens of a row."""
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
