"""Attention with sinks, as gpt-oss has it, by PyTorch's scaled dot product: no score is stored.

A sink is a score that each head has of its own and that belongs to no token. It takes part in the
softmax, and its share goes nowhere. transformers has no ``sdpa`` for it. Here it is one more key
before all others, whose value is zero: queries have one more dimension that holds the head's sink,
and that key alone has 1 there. That is exact, and any kernel can do it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lemo_sinks"
MODELS = ("gpt_oss",)  # types of models that run it
WIDER = 8  # dimensions that are added to a head; one is used, but kernels take multiples of 8


def attend_with_sinks(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    s_aux: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One of transformers' attention functions.

    Args:
        module: The attention module.
        query: Queries, ``[B, heads, Q, D]``.
        key: Keys, ``[B, key heads, K, D]``.
        value: Values, ``[B, key heads, K, D]``.
        attention_mask: Bool or additive mask, ``[B or 1, 1, Q, K]``; None: causal attention, or one
            query that sees all keys.
        scaling: Factor of the products of queries and keys.
        s_aux: Sinks, ``[heads]``, as scores.
        **kwargs: Other arguments of `sdpa_attention_forward`.

    Returns:
        ``[B, Q, heads, D]``, and None in the place of weights.
    """
    size, queries = query.shape[-1], query.shape[2]
    # A causal kernel lets query i see keys 0 to i. With the sink before all keys that would be one
    # too few, so a query that is dropped goes before all queries.
    ahead = int(attention_mask is None and queries > 1)
    sinks = (s_aux.float() / scaling).to(query.dtype)[None, :, None, None]
    query = torch.cat([query, sinks.expand(len(query), -1, queries, 1)], -1)
    query = pad(query, (0, WIDER - 1, ahead, 0))
    is_sink = torch.zeros(key.shape[2] + 1, 1, dtype=key.dtype, device=key.device)
    is_sink[0] = 1
    key = torch.cat([pad(key, (0, 0, 1, 0)), is_sink.expand(*key.shape[:2], -1, 1)], -1)
    key = pad(key, (0, WIDER - 1))
    value = pad(value, (0, WIDER, 1, 0))
    if attention_mask is not None:
        attention_mask = pad(attention_mask, (1, 0), value=attention_mask.dtype == torch.bool)
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return out[:, ahead:, :, :size], None


AttentionInterface.register(NAME, attend_with_sinks)
AttentionMaskInterface.register(NAME, sdpa_mask)
