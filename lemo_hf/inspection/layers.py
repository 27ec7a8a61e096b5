"""The quantities of the paper's figures, measured on the user's own model and text.

Informativeness is measured in a dense pass. Kept blocks are those of a sparse pass as in training,
in which each layer reads the stream that the layers below have written.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lemo_hf.config import LeMoConfig
from lemo_hf.core.loss import shifted
from lemo_hf.core.observe import observe
from lemo_hf.core.policies import POLICIES, ScoreInputs, rank
from lemo_hf.lemo import LeMo
from lemo_hf.modes import evaluating
from lemo_hf.patch import apply_lemo, input_device, remove_lemo, transformers_model
from lemo_hf.tune.measure import sparse_evaluation
from lemo_hf.tune.recall import recall

# Of the layer's largest score: blocks below it count as uninformative, as in the paper's figure.
SMALL = 0.3


@dataclass(frozen=True)
class Inspection:
    """Measurements of one text in one model.

    Attributes:
        tokens: Length of the text.
        block_size: Tokens a block.
        config: LeMo's settings, as a dictionary.
        informativeness: Oracle score of each block in each layer of the dense pass, ``[L][N]``.
        kept: Blocks that the sparse pass kept, ``[L][N]`` bool, by ``"attention"`` and ``"mlp"``.
        retention: Share of the blocks that was kept, ``[L]``, likewise.
        recall: Share of the blocks that the oracle would keep which the config's policy would keep
            too, both in the dense pass, ``[L]``; None for dense layers.
        sparsity: Share of the blocks whose score is below `SMALL` times the layer's largest,
            ``[L]``, by length in tokens.
    """

    tokens: int
    block_size: int
    config: dict[str, Any]
    informativeness: list[list[float]]
    kept: dict[str, list[list[bool]]]
    retention: dict[str, list[float]]
    recall: list[float | None]
    sparsity: dict[int, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as a dictionary for JSON."""
        return dataclasses.asdict(self)


def inspect_text(
    model: nn.Module,
    input_ids: Sequence[int],
    config: LeMoConfig,
    lengths: Sequence[int] | None = None,
    progress: bool = True,
    labels: Sequence[int] | None = None,
) -> Inspection:
    """Measure which blocks of a text ``model`` needs, and which ``config`` keeps.

    Args:
        model: Causal LM or a PEFT model around one, without LeMo on it; unchanged afterwards.
        input_ids: Token ids of the text.
        config: Settings of what LeMo leaves out.
        lengths: Lengths in tokens, for ``sparsity``, of beginnings of the text; with ``labels``, of
            its ends, where answers stand. None: the text is halved down to eight blocks.
        progress: Whether a progress bar is shown.
        labels: Labels, one for each id, -100 for none; blocks with labels ask. None: all ids are
            labels.

    Raises:
        ValueError: The text has fewer than two blocks, a length does not fit, or model and config
            do not go together.
    """
    size = config.block_size
    if len(input_ids) < 2 * size:
        raise ValueError(
            f"the text has {len(input_ids)} tokens, fewer than two blocks of {size}: give more "
            "text, or a smaller block_size."
        )
    if lengths is None:
        lengths = [
            len(input_ids) >> i for i in reversed(range(20)) if len(input_ids) >> i >= 8 * size
        ]
    for length in lengths:
        if not 2 * size <= length <= len(input_ids):
            raise ValueError(
                f"a length must lie between two blocks ({2 * size}) and the text's "
                f"{len(input_ids)} tokens, got {length}."
            )
    lengths = sorted({*lengths, len(input_ids)})
    inner = transformers_model(model)
    ids = torch.as_tensor(input_ids, device=input_device(model)).long()[None]
    asked = ids if labels is None else torch.as_tensor(labels, device=ids.device).long()[None]
    with tqdm(total=len(lengths) + 1, desc="passes", disable=not progress) as bar:
        lemo, kept = run_sparse_pass(model, ids, config, asked)
        bar.update()
        shares = {name: [sum(row) / len(row) for row in rows] for name, rows in kept.items()}
        sparsity = {}
        for length in lengths:
            part = slice(length) if labels is None else slice(len(input_ids) - length, None)
            scores, recalls = _dense_pass(
                inner, ids[:, part], asked[:, part], lemo, shares["attention"]
            )
            small = scores < SMALL * scores.amax(1, keepdim=True)
            sparsity[length] = small.float().mean(1).tolist()
            bar.update()
    return Inspection(
        tokens=len(input_ids),
        block_size=size,
        config=config.to_dict(),
        informativeness=scores.tolist(),
        kept=kept,
        retention=shares,
        recall=recalls,
        sparsity=sparsity,
    )


def run_sparse_pass(
    model: nn.Module, ids: Tensor, config: LeMoConfig, labels: Tensor
) -> tuple[LeMo, dict[str, list[list[bool]]]]:
    """Run a training pass and return what it keeps; dense layers keep everything.

    Args:
        model: Model without LeMo on it; unchanged afterwards.
        ids: Token ids, ``[1, T]``.
        config: Settings of what LeMo leaves out.
        labels: Labels, ``[1, T]``, -100 for none.

    Returns:
        The `LeMo` that was on the model; and the kept blocks, ``[L][N]`` bool, by ``"attention"``
        and ``"mlp"``.
    """
    # Nothing is stored for a backward here, so there is nothing to compute again or to offload.
    lemo = apply_lemo(model, dataclasses.replace(config, recompute="none", offload_gib=None))
    try:
        with sparse_evaluation(model):
            model(input_ids=ids, labels=labels, use_cache=False)
        sets = lemo.passes.tally.kept_blocks
    finally:
        remove_lemo(model)
    everything = torch.ones(-(-ids.shape[1] // config.block_size), dtype=torch.bool)
    return lemo, {
        name: [
            sets[i, name][0].tolist() if (i, name) in sets else everything.tolist()
            for i in range(len(lemo.rules))
        ]
        for name in ("attention", "mlp")
    }


def _dense_pass(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, lemo: LeMo, shares: Sequence[float]
) -> tuple[Tensor, list[float | None]]:
    """Each layer's scores ``[L, N]``, and the recall of the config's policy."""
    scores: list[Tensor] = []
    recalls: list[float | None] = []
    config = lemo.config
    networks = None if lemo.predictor is None else lemo.predictor.layers

    def see(inputs: ScoreInputs) -> None:
        layer = inputs.layer_index
        target = POLICIES["oracle"](inputs)
        scores.append(target[0].float().cpu())
        network = None if networks is None else networks[layer]
        if lemo.rules[layer] is None or (config.policy == "predictor" and network is None):
            recalls.append(None)
            return
        ranking = rank(dataclasses.replace(inputs, predictor=network))
        recalls.append(recall(ranking, target, shares[layer]).item())

    with evaluating(model):
        observe(model, config, ids, see, targets=shifted(labels))
    return torch.stack(scores), recalls
