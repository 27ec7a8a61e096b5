"""Recall: the share of the most attended blocks that a ranking keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lemo_hf.batch.selection import keep_blocks, num_kept_blocks
from lemo_hf.config import LeMoConfig
from lemo_hf.core.policies import POLICIES
from lemo_hf.modes import evaluating
from lemo_hf.patch import transformers_model
from lemo_hf.predictors.predictor_set import LeMoPredictor
from lemo_hf.tune.looked_at import LookedAt, Row, collate

# Policies that predictors are compared with; overlap where only a part of a row is labelled.
BASELINES = ("overlap", "pooled", "recent", "random")
ASKING = 32  # blocks of a row that ask, at most


def recall(
    scores: Tensor, target: Tensor, retention: float, required: Tensor | None = None
) -> Tensor:
    """Share of the blocks kept by ``target`` that ``scores`` keep too.

    Args:
        scores: Scores of the ranking, ``[B, N]``.
        target: ``[B, N]``.
        retention: Share of the N blocks that is kept.
        required: Blocks that are always kept, ``[B, N]`` bool; None: the first and the last block.

    Returns:
        ``[B]`` fp32.
    """
    real = torch.ones_like(target, dtype=torch.bool)
    if required is None:
        required = torch.zeros_like(real)
        required[:, [0, -1]] = True
    least = int(required.sum(1).max())
    count = max(num_kept_blocks(retention, target.shape[1]), least)
    kept, oracle = (keep_blocks(x, real, required, count) for x in (scores, target))
    return (kept & oracle).sum(1) / oracle.sum(1)


@torch.no_grad()
def recall_table(
    model: nn.Module,
    predictor: LeMoPredictor,
    documents: dict[str, Sequence[Row]],
    retentions: Sequence[float] = (0.15, 0.3),
    baselines: Sequence[str] = BASELINES,
) -> list[dict]:
    """Recall of the predictor and of baselines, for each layer that has a predictor.

    The target is what asking blocks attend to most (`LookedAt`). At most `ASKING` blocks of a row
    ask, the same for all rankings. ``"untrained"`` is a predictor that learned nothing, so that
    tokens look for similar tokens.

    Args:
        model: Base model; it runs dense, in evaluation mode.
        predictor: Predictor made for this model.
        documents: Rows as for `train_predictor`, by the name of their kind.
        retentions: Shares of the blocks that are kept.
        baselines: Names of policies to compare with.

    Returns:
        One row for each ``documents``, ``retention``, ``layer`` and ``policy`` with the mean
        ``recall``.
    """
    model = transformers_model(model)
    config = LeMoConfig(policy="oracle", block_size=predictor.info.block_size)
    device = next(model.parameters()).device
    found: dict[tuple, list[float]] = {}
    total = sum(map(len, documents.values()))
    with evaluating(model), tqdm(total=total, desc="recall", unit="row") as bar:
        for name, rows in documents.items():
            for number, row in enumerate(rows):
                batch = collate([row], device)
                seen = LookedAt(model, config, batch, predictor.known, ASKING, [number])
                for layer in predictor.known:
                    inputs, network = seen.streams[layer], predictor.layers[layer]
                    assert network is not None  # it is known
                    read = seen.rows(layer)
                    scores = {
                        name: net(read, seen.index, seen.asks, rare=seen.rare)
                        for name, net in (
                            ("predictor", network),
                            ("untrained", network.untrained(read)),
                        )
                    }
                    for policy in baselines:
                        if policy != "overlap" or bool(inputs.sparse_pass.asks.any()):
                            scores[policy] = POLICIES[policy](inputs)
                    target = seen.target.sum(1)
                    for policy, ranking in scores.items():
                        for share in retentions:
                            key = (name, share, layer, policy)
                            value = recall(
                                ranking, target, share, inputs.sparse_pass.required
                            ).item()
                            found.setdefault(key, []).append(value)
                bar.update()
    names = ("documents", "retention", "layer", "policy")
    return [
        {**dict(zip(names, key, strict=True)), "recall": sum(values) / len(values)}
        for key, values in sorted(found.items())
    ]
