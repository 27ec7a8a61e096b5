"""Images among the tokens of a row: the blocks of an image are kept or left out together."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lemo_hf.predictors.training_free import ranks

# Fields of a multimodal model's config that name the tokens whose embeddings an encoder makes.
PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")


def image_tokens(input_ids: Tensor, config: Any) -> Tensor:
    """Where the tokens of images, videos and sound are.

    Args:
        input_ids: Token ids, ``[B, T]``.
        config: The multimodal model's config.

    Returns:
        ``[B, T]`` bool.
    """
    names = [getattr(config, name, None) for name in PLACEHOLDERS]
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in {token for token in names if token is not None}:
        found |= input_ids == token
    return found


def block_groups(images: Tensor, block_size: int) -> Tensor:
    """Numbers of the groups that blocks form where an image reaches from one into the next.

    An image is a run of image tokens. One other token within a run, such as Pixtral's break between
    the lines of an image, does not end it.

    Args:
        images: Where image tokens are, ``[B, T]`` bool.
        block_size: Tokens a block.

    Returns:
        ``[B, N]`` int64, ascending: blocks of one group have the same number.
    """
    between = pad(images[:, :-1], (1, 0)) & pad(images[:, 1:], (0, 1))
    images = images | between
    crosses = images[:, block_size - 1 : -1 : block_size] & images[:, block_size::block_size]
    return (~pad(crosses, (1, 0))).cumsum(1) - 1


def together(blocks: Tensor, groups: Tensor) -> Tensor:
    """``blocks [B, N]`` bool, and with each of them its whole group."""
    any_of = torch.zeros_like(groups).scatter_reduce(1, groups, blocks.long(), "amax")
    return any_of.gather(1, groups).bool()


def mean_scores(scores: Tensor, groups: Tensor) -> Tensor:
    """The mean score of each block's group, ``[B, N]`` fp64."""
    scores = scores.double()
    sums = torch.zeros_like(scores).scatter_add(1, groups, scores)
    return (sums / _sizes(groups, scores).clamp_min(1)).gather(1, groups)


def keep_groups(scores: Tensor, groups: Tensor, budget: Tensor | int) -> Tensor:
    """The best groups of each row that ``budget`` blocks hold whole.

    A group's score is the mean of its blocks' scores. If the next best group does not fit, the best
    blocks that stand alone fill the rest of the budget.

    Args:
        scores: Block scores, ``[B, N]``, see `lemo_hf.batch.selection.keep_blocks`.
        groups: Group numbers, ``[B, N]`` int64, see `block_groups`.
        budget: Number of blocks that each row keeps, ``[B, 1]`` or one for all rows.

    Returns:
        ``[B, N]`` bool, at most ``budget`` blocks a row.
    """
    scores = mean_scores(scores, groups)
    rank = ranks(scores)  # neighbours with the same score, as those of a group, have ranks in turn
    last = torch.zeros_like(rank).scatter_reduce(1, groups, rank, "amax").gather(1, groups)
    kept = last < budget
    alone = (_sizes(groups, scores).gather(1, groups) == 1) & ~kept
    left = budget - kept.sum(1, keepdim=True)
    return kept | (alone & (ranks(scores.masked_fill(~alone, -torch.inf)) < left))


def _sizes(groups: Tensor, like: Tensor) -> Tensor:
    """Blocks of each group, ``[B, N]`` by its number."""
    return torch.zeros_like(like).scatter_add(1, groups, torch.ones_like(like))
