"""Batches of pairs: rows i and B/2 + i are two answers to one prompt, and keep the same blocks of
it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lemo_hf.batch.row_counts import RowCounts
from lemo_hf.predictors.training_free import ranks


def partners(x: Tensor) -> Tensor:
    """``x [B, ...]`` with each row in the place of its partner."""
    return x.roll(x.shape[0] // 2, 0)


def pair_scores(scores: Tensor, prompt: Tensor) -> Tensor:
    """Scores for both rows of a pair: of a block's two ranks the better one.

    So the best k blocks have equally many of each row's best blocks, whatever the scale of the
    scores.

    Args:
        scores: ``[B, N]``; higher is better. NaN counts as lowest.
        prompt: ``[B, N]`` bool: blocks that hold only prompt, the same in both rows.

    Returns:
        ``[B, N]`` fp32, negative; the same of both rows within the prompt.
    """
    scores = scores.float().nan_to_num(nan=-math.inf).masked_fill(~prompt, -math.inf)
    place = ranks(scores)
    return -torch.minimum(place, partners(place))


def pair_budgets(budgets: list[int], rows: Sequence[RowCounts]) -> list[int]:
    """Budgets of the rows, by which both rows of a pair keep equally many blocks of their prompt.

    The number is what the row with the longer answer has left for the prompt: neither row exceeds
    its budget.

    Args:
        budgets: Blocks that each row would keep by itself.
        rows: Counts of the rows.
    """
    half = len(rows) // 2
    left = [budget - row.label_blocks for budget, row in zip(budgets, rows, strict=True)]
    least = [min(pair) for pair in zip(left[:half], left[half:], strict=True)] * 2
    return [
        max(prompt + row.label_blocks, row.required_blocks)
        for prompt, row in zip(least, rows, strict=True)
    ]
