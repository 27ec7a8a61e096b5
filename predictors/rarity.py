"""How rare a token is in its row: a question can ask for what a row says once."""

import torch
from torch import Tensor


def rarity(
    input_ids: Tensor, valid: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """Minus the logarithm of how often a token stands in its document.

    Args:
        input_ids: Token ids, ``[B, T]`` integer.
        valid: Mask of tokens, ``[B, T]`` bool, False at padding, which is counted separately; None:
            all are tokens.
        documents: Document ids, ``[B, T]`` ascending integers; None: a row is one document.

    Returns:
        Rarity in nats, ``[B, T]`` fp32, at most 0. It is the same on any device; the host waits for
        nothing.
    """
    key = input_ids.long()
    if documents is not None:
        key = key + (documents.long() << 32)
    if valid is not None:
        key = torch.where(valid, key, -1)
    ordered = key.sort(dim=1).values
    count = torch.searchsorted(ordered, key, right=True) - torch.searchsorted(ordered, key)
    return -count.float().log()
