"""Dry steps: matrix products and attention return memory that nobody wrote; the rest runs.

A dry step allocates what a real one does, in the same order, in a small part of its time, so that
the longest sequence can be searched for by trying. The numbers in it are garbage.

The kernels are replaced in PyTorch's dispatcher rather than by a dispatch mode: under a mode
autograd adds gradients up out of place, which takes more memory. What attention allocates beside
its outputs is measured on the real one first (`calibrate`).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
VARIANTS = ("", ".out", ".dtype", ".dtype_out", "_")
ATTENTION = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
BACKWARD = "_backward"
BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
CALIBRATED_AT = (4096, 8192)  # rows

# Bytes that an attention operator takes beside its outputs: those without rows, and those a row,
# by operator, heads, key heads and size of a head.
_beside: dict[tuple, tuple[float, float]] = {}


class DryKernels:
    """While it is entered, products and attention do no arithmetic.

    Args:
        device: Whose kernels to replace.

    Attributes:
        flops: Floating-point operations that were left out; half of the square where attention is
            causal.
        uncalibrated: Attention operators that ran in a shape which `calibrate` has not seen.
    """

    def __init__(self, device: torch.device):
        self.key = device.type.upper()
        self.flops = 0
        self.uncalibrated: set[tuple] = set()

    def __enter__(self) -> "DryKernels":
        self._library = torch.library.Library("aten", "IMPL")  # given back on exit
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, kernel in self._kernels():
                self._library.impl(name, kernel, self.key)
        return self

    def __exit__(self, *_: Any) -> None:
        self._library._destroy()

    def _kernels(self) -> Iterator[tuple[str, Callable]]:
        for name in PRODUCTS:
            for variant in VARIANTS:
                if _exists(name + variant):
                    yield name + variant, partial(self._product, name, variant)
        for name in ATTENTION:
            for whole in (name, name + BACKWARD):
                if _exists(whole):
                    yield whole, partial(self._attention, whole)

    def _product(self, name: str, variant: str, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in args if isinstance(x, Tensor)]
        left, right = tensors[-2:] if name in ("mm", "bmm") else tensors[1:3]
        self.flops += 2 * prod(left.shape) * right.shape[-1]
        if "out" in kwargs:
            return kwargs["out"]
        if variant == "_":
            return tensors[0]
        dtypes = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
        shape = (*left.shape[:-1], right.shape[-1])
        return torch.empty(shape, dtype=[left.dtype, *dtypes][-1], device=left.device)

    def _attention(self, name: str, *args: Any, **kwargs: Any) -> Any:
        queries, keys, _ = _operands(name, args)
        self.flops += attention_flops(name, args, kwargs)
        key = (name, queries.shape[1], keys.shape[1], queries.shape[3])
        if key not in _beside and queries.is_cuda:
            self.uncalibrated.add(key)
        fixed, each = _beside.get(key, (0.0, 0.0))
        size = int(fixed + each * queries.shape[0] * queries.shape[2])
        outputs = _empty_outputs(getattr(torch.ops.aten, name).default, args, kwargs, queries)
        temporaries = torch.empty(max(0, size), dtype=torch.uint8, device=queries.device)
        del temporaries
        return outputs


def attention_flops(name: str, args: tuple, kwargs: dict) -> int:
    """Operations of one attention operator: two products forward, five backward."""
    queries, keys, is_backward = _operands(name, args)
    schema = getattr(torch.ops.aten, name).default._schema
    values = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    square = 2 * prod(queries.shape) * keys.shape[2]
    products = 5 if is_backward else 2
    return products * square // (2 if values.get("is_causal") else 1)


def _operands(name: str, args: tuple) -> tuple[Tensor, Tensor, bool]:
    """Queries, keys, and whether it is the backward, which is given a gradient first."""
    is_backward = name.endswith(BACKWARD)
    return args[is_backward], args[1 + is_backward], is_backward


def _empty_outputs(operator: Any, args: tuple, kwargs: dict, like: Tensor) -> Any:
    """Unwritten outputs of an operator, of the shapes that its meta kernel gives."""

    def to_meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")

    def to_real(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=like.device)

    return tree_map(to_real, operator(*tree_map(to_meta, args), **tree_map(to_meta, kwargs)))


def _exists(name: str) -> bool:
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return packet is not None and (overload or "default") in packet.overloads()


class _Beside(TorchDispatchMode):
    """Measures what attention operators allocate beside what they return."""

    def __init__(self):
        super().__init__()
        self.found: dict[tuple, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.removesuffix(BACKWARD) not in ATTENTION:
            return func(*args, **(kwargs or {}))
        torch.cuda.reset_peak_memory_stats()
        out = func(*args, **(kwargs or {}))
        beside = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        queries, keys, _ = _operands(name, args)
        self.found[name, queries.shape[1], keys.shape[1], queries.shape[3]] = beside
        return out


def calibrate(heads: int, key_heads: int, size: int, device: torch.device) -> dict[str, list]:
    """Measure what attention takes beside its outputs, for dry steps with these heads.

    Returns:
        By operator: bytes whatever the length, and bytes a row.
    """
    if device.type != "cuda":
        return {}
    measured = [_beside_at(rows, heads, key_heads, size, device) for rows in CALIBRATED_AT]
    found = {}
    for key, low in measured[0].items():
        high = measured[1].get(key, low)
        each = (high - low) / (CALIBRATED_AT[1] - CALIBRATED_AT[0])
        _beside[key] = (low - each * CALIBRATED_AT[0], each)
        found[key[0]] = [round(x, 2) for x in _beside[key]]
    return found


def _beside_at(
    rows: int, heads: int, key_heads: int, size: int, device: torch.device
) -> dict[tuple, int]:
    """Bytes that each backend's operators take beside their outputs."""
    # As transformers lays them out: heads are the second of the inner dimensions.
    shapes = [(1, rows, n, size) for n in (heads, key_heads, key_heads)]
    with _Beside() as mode:
        for backend in BACKENDS:
            q, k, v = (
                torch.randn(s, device=device, dtype=torch.bfloat16).requires_grad_().transpose(1, 2)
                for s in shapes
            )
            try:
                with sdpa_kernel([backend]):
                    out = torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=heads != key_heads
                    )
                out.backward(torch.randn_like(out))
            except RuntimeError:  # not built, or not for such heads
                continue
    return mode.found


@contextmanager
def numbers_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give weights and the optimizer's states back as they were; a dry step fills them with
    garbage. The states must exist."""
    held = []
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = [x for x in optimizer.state[weight].values() if isinstance(x, Tensor)]
            held += [(x, x.detach().to("cpu", copy=True)) for x in (weight.data, *state)]
    try:
        yield
    finally:
        for tensor, value in held:
            tensor.copy_(value)
