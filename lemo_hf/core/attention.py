"""The fastest of PyTorch's attention kernels for a model on this device, found by one trial.

On an H200 cuDNN's kernel takes 55 ms where FlashAttention 2's takes 94 ms (32,768 tokens, 32 query
and 8 key heads of 128, forward and backward). Other implementations (``flash_attention_2``,
``flash_attention_3``, the kernels hub) run if the user chooses them by ``attn_implementation``.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lemo_hf.core import sink_attention

TOKENS = 4096  # of the trial, for queries as wide as WIDE; more where they are narrower
WIDE = 4096
_CANDIDATES = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
_ANY = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def fastest_attention(
    module: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[SDPBackend, ...] | None:
    """Backends in the order to try them, or None to leave PyTorch's own order.

    Args:
        module: Attention module of the model.
        device: Device on which it runs.
        dtype: Dtype of its queries.
    """
    if device.type != "cuda" or not by_sdpa(implementation_of(module)) or dtype.itemsize != 2:
        return None
    config: Any = module.config  # transformers', whose fields differ by family
    heads = config.num_attention_heads
    groups = getattr(module, "num_key_value_groups", None)  # which may differ by layer
    keys = heads // groups if groups else getattr(config, "num_key_value_heads", None) or heads
    size = getattr(module, "head_dim", None) or config.hidden_size // heads
    size += sink_attention.WIDER if implementation_of(module) == sink_attention.NAME else 0
    return _tried(heads, keys, size, device, dtype)


def describe_attention(module: nn.Module) -> str:
    """Name of the implementation that an attention module runs, and of its kernel here if known."""
    weight = next(module.parameters())
    kernels = fastest_attention(module, weight.device, weight.dtype)
    name = implementation_of(module)
    name = f"{name} ({kernels[0].name.lower()})" if kernels else name
    if name == "eager" and hasattr(module, "sinks"):
        better = f"attn_implementation={sink_attention.NAME!r} stores none"
        return f"{name} (which stores every score; {better})"
    return name


def implementation_of(module: nn.Module) -> str:
    """Name of the implementation that an attention module runs; without a config it has only
    one."""
    config: Any = getattr(module, "config", None)
    return "eager" if config is None else config._attn_implementation


def by_sdpa(implementation: str) -> bool:
    """Whether an attention implementation calls PyTorch's `scaled_dot_product_attention`."""
    return implementation in ("sdpa", sink_attention.NAME)


def using(backends: tuple[SDPBackend, ...] | None) -> AbstractContextManager:
    """Within this context the first of ``backends`` that supports a call runs it."""
    if backends is None:
        return nullcontext()
    return sdpa_kernel(list(backends), set_priority=True)


@cache
def _tried(
    heads: int, keys: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[SDPBackend, ...] | None:
    """Candidates that run here, the fastest first, then those that can replace them."""
    times = {}
    for backend in _CANDIDATES:
        try:
            times[backend] = _milliseconds(backend, heads, keys, size, device, dtype)
        except RuntimeError:  # not built, or not for such heads
            continue
    return (*sorted(times, key=lambda backend: times[backend]), *_ANY) if times else None


@torch.enable_grad()
def _milliseconds(
    backend: SDPBackend, heads: int, keys: int, size: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Milliseconds of the faster of two runs, forward and backward, after one untimed run.

    The work is the same for any model, or the trial would time the host's launches: with a model of
    135 M parameters one trial in two chose the kernel that is slower by half.
    """
    tokens = TOKENS * max(1, math.ceil(math.sqrt(WIDE / (heads * size))))
    shapes = [(1, tokens, count, size) for count in (heads, keys, keys)]
    tensors = [torch.randn(s, device=device, dtype=dtype).transpose(1, 2) for s in shapes]
    query, key, value = (x.requires_grad_() for x in tensors)
    best = float("inf")
    with sdpa_kernel([backend]), torch.autocast(device.type, enabled=False):
        for timed in (False, True, True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=heads != keys
            )
            torch.autograd.grad(out, (query, key, value), out)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end)) if timed else best
    return best
