"""The language-model loss of a sparse pass, of tokens that have a loss, segment by segment."""

from typing import Any

import torch
from torch import Tensor, nn

from lemo_hf.core.family import Family
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.norm import Norm
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX, segment_cross_entropy


def shifted(labels: Tensor) -> Tensor:
    """The token that each position must predict: ``labels [B, T]`` shifted one to the left, the
    last ignored."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def of_tokens(targets: Tensor, sparse_pass: SparsePass) -> Tensor:
    """``targets [B, T]`` with those of padding ignored, which no layer reads."""
    return (
        targets
        if sparse_pass.valid is None
        else targets.masked_fill(~sparse_pass.valid, IGNORE_INDEX)
    )


def supervised(sparse_pass: SparsePass) -> Tensor:
    """Tokens kept at least as often as the average token of their row: ``[B, T]`` bool."""
    times = sparse_pass.times_kept
    # In whole numbers: rounded, the mean of a long row may be more than what all were kept.
    found = times.long() * sparse_pass.row_tokens.clamp_min(1) >= times.sum(1, keepdim=True)
    return found if sparse_pass.valid is None else found & sparse_pass.valid


def most_labels(sparse_pass: SparsePass) -> int | None:
    """Upper bound of the number of tokens that have a loss; None if only the device knows.

    Only the device knows if layers choose sets of their own and tokens that are kept most often
    have the loss. If processes share the sequence, the bound is for the tokens that this process
    holds.
    """
    labels = sum(row.most_labels for row in sparse_pass.rows)
    if sparse_pass.config.supervise == "all":
        return labels
    if set(sparse_pass.agreed) != {"attention"}:
        return None
    kept = sparse_pass.agreed["attention"]
    slots = (sparse_pass.share(kept) or kept).index.shape[1]
    return sum(min(row.most_labels, slots) for row in sparse_pass.rows)


def supervised_targets(targets: Tensor, sparse_pass: SparsePass) -> tuple[Tensor, Tensor]:
    """Targets that have a loss in the pass, and the weight of each row.

    With ``supervise="kept"`` the mean loss over a row's remaining targets stands for the row, so a
    row weighs as much as in dense training: its weight is (its targets) / (remaining targets).

    Args:
        targets: ``[B, T]`` int64, `IGNORE_INDEX` for none.
        sparse_pass: Sparse pass, after its last sparse layer.

    Returns:
        Targets ``[B, T]`` and weights ``[B, 1]`` fp32.
    """
    targets = of_tokens(targets, sparse_pass)
    before = (targets != IGNORE_INDEX).sum(1, keepdim=True)
    if sparse_pass.config.supervise == "kept":
        targets = targets.masked_fill(~supervised(sparse_pass), IGNORE_INDEX)
    after = (targets != IGNORE_INDEX).sum(1, keepdim=True)
    return targets, before / after.clamp_min(1)


def share_left(before: Tensor, after: Tensor) -> Tensor:
    """Share of the targets ``before`` that is left ``after``, fp32 scalar.

    It is 1 if none is left: the sum of losses is then 0, and divided by 0 items it would be NaN.
    """
    count = (before != IGNORE_INDEX).sum().clamp_min(1)
    left = (after != IGNORE_INDEX).sum()
    return torch.where(left > 0, left / count, 1.0)


def segment_loss(
    hidden: Tensor,
    targets: Tensor,
    sparse_pass: SparsePass,
    head: nn.Module,
    family: Family,
    model_config: Any,
    num_items_in_batch: Tensor | int | None,
    norm: Norm | None = None,
) -> Tensor:
    """The model's causal-LM loss without its ``[B, T, V]`` logits.

    Args:
        hidden: Input of the head, ``[B, T, H]``; before ``norm`` if there is one. If processes
            share the sequence, of this process's shard.
        targets: ``[B, T]`` token that each position must predict, `IGNORE_INDEX` for none.
        sparse_pass: Sparse pass under way.
        head: Output embeddings, called as a module.
        family: Names of the config's logit divisor and soft cap.
        model_config: Config of the model.
        num_items_in_batch: Number of labels in all micro-batches of the optimizer step, which
            Trainer counts; None: that of this batch.
        norm: Norm between ``hidden`` and the head, or None.

    Returns:
        Loss in nats per label, fp32 scalar; 0, with gradients of 0, without labels. If processes
        share the sequence, the mean over them is the loss: engines take the mean of their
        gradients, and Trainer of its logs.
    """
    sparse_pass.check_labels(targets)
    count: Tensor | float
    if num_items_in_batch is None:
        count = (of_tokens(targets, sparse_pass) != IGNORE_INDEX).sum().clamp_min(1)
    elif isinstance(num_items_in_batch, Tensor):
        count = num_items_in_batch.to(hidden.device).clamp_min(1)
    else:
        count = max(1, num_items_in_batch)
    if num_items_in_batch is not None and sparse_pass.valid is not None:
        count = count * share_left(
            targets, of_tokens(targets, sparse_pass)
        )  # they count padding's too
    targets, weights = supervised_targets(targets, sparse_pass)
    if sparse_pass.shards is not None:
        targets = sparse_pass.shards.part(targets)
        count = count / sparse_pass.shards.group.size
    total = segment_cross_entropy(
        hidden.flatten(0, 1),
        targets.flatten(),
        weights.expand_as(targets).flatten(),
        head,
        segment_size=sparse_pass.config.segment_size,
        divisor=family.divisor(model_config),
        softcap=family.softcap(model_config),
        parameters=[p for p in head.parameters() if p.requires_grad],
        norm=norm,
        most_labels=most_labels(sparse_pass),
    )
    return total / count
