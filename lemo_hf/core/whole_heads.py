"""Attention on GPUs older than FlashAttention, where heads share keys.

PyTorch has one kernel there that stores no scores, and it takes as many key heads as query heads.
transformers leaves keys as they are, PyTorch falls back to storing a score for each pair of tokens.
Here keys and values are repeated first: that takes memory by token, not by pair of tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo_hf.altered import Altered
from lemo_hf.core.attention import by_sdpa, implementation_of
from lemo_hf.kernels import launch

_NAME = "lemo_whole_heads"


def are_needed(attention: nn.Module, device: torch.device) -> bool:
    """Whether keys must be repeated for ``attention`` on ``device``."""
    return device.type == "cuda" and share_keys(attention) and launch.settle("cuda") is not None


def share_keys(attention: nn.Module) -> bool:
    """Whether ``attention`` gives PyTorch's `scaled_dot_product_attention` fewer key heads than
    query heads."""
    by = by_sdpa(implementation_of(attention))
    return by and getattr(attention, "num_key_value_groups", 1) > 1


def repeating_config(config: Any) -> Any:
    """``config`` of an attention module whose keys are repeated."""
    return Altered(config, {"_attn_implementation": _NAME, "lemo_repeats": config})


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function like transformers': ``[B, heads, n, D]`` each to ``[B, n, heads, D]``."""
    config = module.config.lemo_repeats
    some = Altered(module, {"config": config, "num_key_value_groups": 1})
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    return attend(some, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _attend)
