"""Shifted sparse attention (S2-Attn) of LongLoRA as an attention function of transformers.

A token attends to the earlier tokens of its group, a quarter of the sequence. For half of the heads
the groups begin half a group later, so that neighbours meet; what is left at the two ends is a
group of half the size each, so nothing leaks from the end to the beginning.

Source: LongLoRA, arXiv:2309.12307, own implementation from its description.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "s2attn"
GROUPS = 4  # in a sequence, as in the paper's experiments


def s2_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention within groups; an attention function of transformers.

    Args:
        module: The attention module.
        query: ``[B, heads, T, D]``.
        key: ``[B, key heads, T, D]``.
        value: The same.
        attention_mask: Must be None: whole rows of tokens, causal.
        **kwargs: Of transformers' sdpa function.

    Returns:
        ``[B, T, heads, D]`` and None.

    Raises:
        ValueError: There is a mask, or the length is no multiple of 2 * `GROUPS`.
    """
    tokens = query.shape[2]
    if attention_mask is not None or tokens % (2 * GROUPS):
        raise ValueError(f"S2-Attn needs no mask and a multiple of {2 * GROUPS} tokens")
    size = tokens // GROUPS
    half = size // 2

    def grouped(start: int, stop: int, group: int, heads: int) -> Tensor:
        """Attention of one half of the heads between two tokens, ``[B, tokens, heads, D]``."""
        parts = [
            _groups(x.chunk(2, 1)[heads][:, :, start:stop], group) for x in (query, key, value)
        ]
        out, _ = sdpa_attention_forward(module, *parts, None, **kwargs)
        return out.reshape(len(query), stop - start, *out.shape[2:])

    straight = grouped(0, tokens, size, 0)
    ends = [grouped(start, start + half, half, 1) for start in (0, tokens - half)]
    middle = grouped(half, tokens - half, size, 1)
    shifted = torch.cat([ends[0], middle, ends[1]], 1)
    return torch.cat([straight, shifted], 2), None


def _groups(x: Tensor, size: int) -> Tensor:
    """``[B, heads, T, D]`` as ``[B * T / size, heads, size, D]``."""
    parts = x.unflatten(2, (-1, size)).transpose(1, 2)
    return parts.flatten(0, 1)


def register() -> None:
    """Make ``"s2attn"`` an attention implementation of transformers."""
    AttentionInterface.register(NAME, s2_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
