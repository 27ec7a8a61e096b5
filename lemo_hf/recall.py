"""Recall: which share of the blocks that the oracle keeps another ranking keeps too."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lemo_hf.config import LeMoConfig
from lemo_hf.modes import evaluating
from lemo_hf.observe import observe
from lemo_hf.policies import POLICIES, ScoreInputs
from lemo_hf.predictors.predictor_set import LeMoPredictor
from lemo_hf.selection import keep_blocks, num_kept_blocks

# Rankings that predictors are compared with. "previous": the oracle's scores of the layer below.
# "position": the earliest blocks, or the latest where scores are means.
BASELINES = ("pooled", "random", "previous", "position")


def recall(scores: Tensor, target: Tensor, retention: float) -> Tensor:
    """Share of the blocks kept by ``target`` that ``scores`` keep too; the ends are always kept.

    Args:
        scores: ``[B, N]``.
        target: ``[B, N]``.
        retention: Share of the N blocks.

    Returns:
        ``[B]`` fp32.
    """
    real = torch.ones_like(target, dtype=torch.bool)
    required = torch.zeros_like(real)
    required[:, [0, -1]] = True
    count = num_kept_blocks(retention, target.shape[1])
    kept, oracle = (keep_blocks(x, real, required, count) for x in (scores, target))
    return (kept & oracle).sum(1) / oracle.sum(1)


@torch.no_grad()
def recall_table(
    model: nn.Module,
    predictor: LeMoPredictor,
    documents: dict[str, Sequence[Sequence[int]]],
    retentions: Sequence[float] = (0.3, 0.5),
    baselines: Sequence[str] = BASELINES,
) -> list[dict]:
    """Recall of the predictor and of baselines, layer by layer.

    Args:
        model: The base model; run dense, in evaluation mode.
        predictor: Fitted to it.
        documents: Rows of token ids, of one length, by the name of what they are.
        retentions: Shares of the blocks.
        baselines: Of `BASELINES`.

    Returns:
        One row for each ``documents``, ``head``, ``retention`` and ``policy``: ``mean`` and
        ``least`` over the layers, and ``layers``, all of them (None where there is no predictor).
    """
    config = LeMoConfig(
        block_size=predictor.info.block_size, normalize_scores=predictor.info.normalize_scores
    )
    heads = [head for head in ("attention", "mlp") if getattr(predictor, head) is not None]
    sums: dict[tuple, float] = {}
    counts: dict[str, int] = {}
    device = next(model.parameters()).device
    previous: dict[str, Tensor] = {}

    def see(inputs: ScoreInputs) -> None:
        head, layer = inputs.sublayer, inputs.layer_index
        target = POLICIES["oracle"](inputs)
        rankings = {"previous": previous.get(head, target) if layer else None}
        place = torch.arange(target.shape[1], device=target.device).expand_as(target).float()
        rankings["position"] = place if config.normalize_scores else -place
        for name in ("pooled", "random"):
            rankings[name] = POLICIES[name](inputs) if name in baselines else None
        rankings = {name: rankings[name] for name in baselines}
        network = getattr(predictor, head)[layer]
        if network is not None:
            rankings["predictor"] = POLICIES["predictor"](_with(inputs, network))
        for policy, scores in rankings.items():
            for retention in retentions:
                if scores is not None:
                    key = (name_, head, retention, policy, layer)
                    share = recall(scores, target, retention).sum().item()
                    sums[key] = sums.get(key, 0.0) + share
        previous[head] = target

    total = sum(map(len, documents.values()))
    with evaluating(model), tqdm(total=total, desc="recall", unit="row") as bar:
        for name_, rows in documents.items():
            counts[name_] = len(rows)
            for row in rows:
                ids = torch.as_tensor(row, device=device).long()[None]
                observe(cast(PreTrainedModel, model), config, ids, see, sublayers=heads)
                bar.update()
    return _rows(sums, counts, len(getattr(predictor, heads[0])))


def _with(inputs: ScoreInputs, network: nn.Module) -> ScoreInputs:
    return ScoreInputs(**{**vars(inputs), "predictor": network})


def _rows(sums: dict, counts: dict[str, int], num_layers: int) -> list[dict]:
    table = []
    for documents, head, retention, policy in dict.fromkeys(key[:4] for key in sums):
        layers = [sums.get((documents, head, retention, policy, i)) for i in range(num_layers)]
        layers = [None if x is None else x / counts[documents] for x in layers]
        known = [x for x in layers if x is not None]
        table.append(
            {
                "documents": documents,
                "head": head,
                "retention": retention,
                "policy": policy,
                "mean": sum(known) / len(known),
                "least": min(known),
                "layers": layers,
            }
        )
    return table
