"""The language-model loss of a sparse pass: on tokens that may be asked, by segments."""

from typing import Any

import torch
from torch import Tensor, nn

from lemo_hf.core.family import Family
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.norm import Norm
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX, segment_cross_entropy


def shifted(labels: Tensor) -> Tensor:
    """The token each position must predict: ``labels [B, T]`` one to the left, the end ignored."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def of_tokens(targets: Tensor, sparse_pass: SparsePass) -> Tensor:
    """``targets [B, T]`` without those of padding, which no layer reads and nobody may ask."""
    return (
        targets
        if sparse_pass.valid is None
        else targets.masked_fill(~sparse_pass.valid, IGNORE_INDEX)
    )


def supervised(sparse_pass: SparsePass) -> Tensor:
    """Tokens kept at least as often as the average token of their row: ``[B, T]`` bool."""
    times = sparse_pass.times_kept
    mean = times.sum(1, keepdim=True) / sparse_pass.row_tokens.clamp_min(1)
    found = times >= mean
    return found if sparse_pass.valid is None else found & sparse_pass.valid


def most_labels(sparse_pass: SparsePass) -> int | None:
    """No more tokens than this have a label that is asked for; None if only the device knows.

    The device alone knows where layers choose sets of their own, and tokens kept most often are
    asked. Where processes share the sequence, of the tokens that this one holds.
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
    """Targets the pass may ask for, and each row's weight.

    With ``supervise="kept"`` the mean loss over a row's remaining targets stands for the row, so a
    row weighs as much as in dense training: its weight is (its targets) / (remaining targets).

    Args:
        targets: ``[B, T]`` int64, `IGNORE_INDEX` for none.
        sparse_pass: The forward pass, after its last sparse layer.

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
    """Of the targets ``before`` the share that is left ``after``, fp32 scalar.

    Of none that are left the sum of losses is 0; divided by 0 items it would be NaN: 1 then.
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
        hidden: What the head reads, ``[B, T, H]``; before ``norm`` if there is one. Of the shard
            where processes share the sequence.
        targets: ``[B, T]`` token each position must predict, `IGNORE_INDEX` for none.
        sparse_pass: The forward pass.
        head: The output embeddings, called as a module.
        family: Where the config keeps a logit divisor or soft cap.
        model_config: Config of the model.
        num_items_in_batch: Labels in all micro-batches of the optimizer step (Trainer counts
            them), or None: the labels of this batch.
        norm: Between ``hidden`` and the head, or None.

    Returns:
        Nats per label, fp32 scalar; 0, with gradients of 0, if there is no label. Where processes
        share the sequence, the mean over them is the loss: engines take the mean of their
        gradients, and Trainer of what it logs.
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
