"""From block scores to kept sets: pure functions of tensors, with one budget for each row."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemo_hf.batch.images import keep_groups, mean_scores
from lemo_hf.predictors.training_free import Places, ranks

# Rows that a layer keeps for its attention, and for an MLP with a kept set of its own (or None).
LayerRows = tuple[int, int | None]


@dataclass
class KeptSet:
    """The kept set of a batch.

    Attributes:
        index: ``[B, K]`` int64 token positions, distinct in a row: kept tokens first, in ascending
            order, so that causal order is slot order; then idle slots, if the row keeps fewer than
            K.
        slot_mask: ``[B, K]`` bool, False at idle slots; None without idle slots.
        kept_tokens: Number of kept tokens of the batch, int64 scalar tensor.
        blocks: ``[B, N]`` bool, the kept blocks.
        whole: Whether every position is kept, padding too: the layer is dense.
        cache: What was already gathered by this set, if layers share it; else None.
    """

    index: Tensor
    slot_mask: Tensor | None
    kept_tokens: Tensor
    blocks: Tensor
    whole: bool = False
    cache: dict | None = field(default=None, repr=False)


def num_kept_blocks(retention: float, num_blocks: int) -> int:
    """Number of blocks kept of ``num_blocks``: the share, rounded up (but not because of a rounding
    error)."""
    return math.ceil(round(retention * num_blocks, 6))


def block_any(tokens: Tensor, block_size: int) -> Tensor:
    """``[B, T]`` bool to ``[B, ceil(T / block_size)]``: whether any token of the block is set."""
    padding = -tokens.shape[1] % block_size
    return torch.nn.functional.pad(tokens, (0, padding)).unflatten(1, (-1, block_size)).any(2)


def keep_blocks(
    scores: Tensor,
    real: Tensor,
    required: Tensor,
    budget: Tensor | int,
    documents: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """The best ``budget[b]`` blocks of each row, required ones first.

    The documents of a packed row keep the same share each: blocks compete by their rank within
    their document, divided by its number of blocks.

    Args:
        scores: ``[B, N]``; higher is better, ties go to the earlier block. NaN counts as lowest.
        real: ``[B, N]`` bool, False at blocks of padding alone: never kept.
        required: ``[B, N]`` bool: always kept.
        budget: ``[B, 1]`` blocks to keep in each row, or one number for all rows; at least the
            row's required blocks.
        documents: ``[B, N]`` ascending ids of documents, or None if each row is one.
        groups: ``[B, N]`` of blocks that are kept together, see `block_groups`; or None. Then a row
            may keep less than its budget, if what is left holds no further group.

    Returns:
        ``[B, N]`` bool.
    """
    low, high = -math.inf, math.inf
    scores = scores.float().nan_to_num(nan=low, posinf=torch.finfo(torch.float32).max)
    scores = scores.masked_fill(required, high).masked_fill(~real, low)
    if documents is not None:
        order = scores.argsort(dim=1, descending=True, stable=True)
        by_document = documents.gather(1, order).argsort(dim=1, stable=True)
        places = Places.of(real, documents)  # of blocks in their documents, as many as of ranks
        rank = torch.empty_like(order).scatter_(1, order.gather(1, by_document), places.place)
        scores = -(rank + 0.5) / places.size
        scores = scores.masked_fill(required, high).masked_fill(~real, low)
    if groups is not None:
        return keep_groups(scores, groups, budget) & real
    return (ranks(scores) < budget) & real


def blocks_above(
    scores: Tensor,
    real: Tensor,
    required: Tensor,
    threshold: float,
    documents: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """The blocks that score at least ``threshold`` times the mean of their document's real blocks.

    Args:
        scores: ``[B, N]``, at least 0. NaN counts as 0.
        real: ``[B, N]`` bool, False at blocks of padding alone: never kept, no part of the mean.
        required: ``[B, N]`` bool: always kept.
        threshold: Factor of the mean, at least 0; 0 keeps every real block.
        documents: ``[B, N]`` ascending ids of documents, or None if each row is one.
        groups: ``[B, N]`` of blocks that count as they do on average, see `block_groups`; or None.

    Returns:
        ``[B, N]`` bool. Rows keep different numbers of blocks.

    Source: LeMo, arXiv:2501.09767, Algorithm 1, which starts each layer's threshold at the mean.
    """
    # In fp64 no padding beside a row, and no block beside a block, moves a score over the line.
    scores = scores.double().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max) * real
    places = Places.of(real, documents)
    sums = torch.zeros_like(scores).scatter_add_(1, places.document, scores)
    mean = sums.gather(1, places.document) / places.size.clamp_min(1)
    if groups is not None:
        scores = mean_scores(scores, groups)
    return ((scores >= threshold * mean) | required) & real


def kept_set(kept: Tensor, blocks: Tensor, num_slots: int, exact: bool, shared: bool) -> KeptSet:
    """The kept set of the tokens ``kept [B, T]`` bool, which make up ``blocks``, in ``num_slots``
    slots a row.

    ``exact``: every row keeps exactly ``num_slots`` tokens. ``shared``: layers share the set.
    """
    # A stable sort puts the kept positions first, in order, and eliminated ones into idle slots.
    index = kept.byte().sort(dim=1, descending=True, stable=True).indices[:, :num_slots]
    counts = kept.sum(1)
    slots = torch.arange(num_slots, device=kept.device)
    slot_mask = None if exact else slots < counts[:, None]
    return KeptSet(
        index.contiguous(), slot_mask, counts.sum(), blocks, cache={} if shared else None
    )
