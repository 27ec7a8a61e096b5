"""How rare a token is in its row: what a row says once is what a question can be about."""

import torch
from torch import Tensor


def rarity(
    input_ids: Tensor, valid: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """Minus the logarithm of how often a token stands in its document.

    Args:
        input_ids: ``[B, T]`` integer.
        valid: ``[B, T]`` bool, False at padding, which is counted apart; None: all are tokens.
        documents: ``[B, T]`` ascending integer ids, or None: a row is one document.

    Returns:
        ``[B, T]`` fp32, at most 0. The same on any device; the host waits for nothing.
    """
    key = input_ids.long()
    if documents is not None:
        key = key + (documents.long() << 32)
    if valid is not None:
        key = torch.where(valid, key, -1)
    ordered = key.sort(dim=1).values
    count = torch.searchsorted(ordered, key, right=True) - torch.searchsorted(ordered, key)
    return -count.float().log()
