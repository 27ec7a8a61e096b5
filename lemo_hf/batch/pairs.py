"""Batches of pairs: rows i and B/2 + i are two answers to one prompt, which keep the same of it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lemo_hf.batch.row_counts import RowCounts
from lemo_hf.predictors.training_free import ranks


def partners(x: Tensor) -> Tensor:
    """Of each row of ``x [B, ...]`` that of its partner."""
    return x.roll(x.shape[0] // 2, 0)


def pair_scores(scores: Tensor, prompt: Tensor) -> Tensor:
    """What both rows of a pair need of their prompt, by ranks: the better of a block's two.

    So the best k blocks are as many of the best of one row as of the best of the other, whatever
    the scale of their scores.

    Args:
        scores: ``[B, N]``; higher is better. NaN counts as lowest.
        prompt: ``[B, N]`` bool: blocks of the prompt alone, the same of both rows.

    Returns:
        ``[B, N]`` fp32, negative; the same of both rows within the prompt.
    """
    scores = scores.float().nan_to_num(nan=-math.inf).masked_fill(~prompt, -math.inf)
    place = ranks(scores)
    return -torch.minimum(place, partners(place))


def pair_budgets(budgets: list[int], rows: Sequence[RowCounts]) -> list[int]:
    """Blocks to keep of each row, so that both of a pair keep as many of their prompt.

    That is what the row with the longer answer has left for it: neither row exceeds its budget.

    Args:
        budgets: Of each row by itself.
        rows: Their counts.
    """
    half = len(rows) // 2
    left = [budget - row.label_blocks for budget, row in zip(budgets, rows, strict=True)]
    least = [min(pair) for pair in zip(left[:half], left[half:], strict=True)] * 2
    return [
        max(prompt + row.label_blocks, row.required_blocks)
        for prompt, row in zip(least, rows, strict=True)
    ]
