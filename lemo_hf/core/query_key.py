"""A layer's real queries and keys, as its own attention module makes them."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from lemo_hf.altered import altering


@dataclass(frozen=True)
class QueryKey:
    """Arguments that an attention module gives its attention function.

    Attributes:
        query: ``[B, H, T, D]``, rotated.
        key: ``[B, H_kv, T, D]``, rotated.
        scaling: Factor of ``q . k``.
        window: Sliding window in tokens, or None.
        softcap: Soft cap of scores, as in Gemma 2, or None.
    """

    query: Tensor
    key: Tensor
    scaling: float
    window: int | None
    softcap: float | None


_CAPTURE = "lemo_capture"
_captured: list[QueryKey] = []


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention implementation that keeps its arguments and attends to nothing."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    _captured.append(QueryKey(query, key, scaling, window, kwargs.get("softcap")))
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(_CAPTURE, _capture)


def query_key(
    attention: nn.Module,
    hidden: Tensor,
    positions: tuple[Tensor, Tensor] | None,
    position_ids: Tensor | None = None,
) -> QueryKey:
    """Queries and keys of ``hidden [B, T, H]`` exactly as the attention module makes them.

    Args:
        attention: Attention module that uses transformers' `AttentionInterface`.
        hidden: Input of the module, ``[B, T, H]``.
        positions: Rotary cos and sin of the rows, or None.
        position_ids: Position ids of the rows, if the module reads them too.
    """
    own: Any = copy.copy(attention.config)
    own._attn_implementation = _CAPTURE
    given = {"position_embeddings": positions, "position_ids": position_ids}
    extra: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        with altering(attention, config=own):
            attention(hidden_states=hidden, attention_mask=None, **extra)
        return _captured.pop()
    finally:
        _captured.clear()  # after an error, too: they are as large as the sequence
