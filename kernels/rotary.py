"""Rotary position embedding at kept positions, reading cos and sin of the whole sequence.

One pass over queries and keys; no gathered cos and sin, no rotated copy.

Memory traffic, in elements: reads and writes K*D of all heads; cos and sin come from the cache
(unfused: five times that, for the products, the rotated halves and their sum).

Source: RoFormer, arXiv:2104.09864, in the half-rotation layout of transformers.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.kernels.launch import use_triton
from lemo_hf.kernels.rows import gather_rows


@dataclass(frozen=True)
class KeptRotary:
    """``table [B or 1, T, R]`` (cos or sin) at the positions ``keep_index [B, K]``."""

    table: Tensor
    keep_index: Tensor

    @cached_property
    def gathered(self) -> Tensor:
        """Gathered table, ``[B, K, R]``, for attention modules that read cos and sin themselves."""
        return gather_rows(self.table.expand(len(self.keep_index), -1, -1), self.keep_index)


def rotary_reference(x: Tensor, cos: KeptRotary, sin: KeptRotary) -> Tensor:
    """``x [B, heads, K, D]`` with its first R dimensions rotated; rounds once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cosine, sine = (part.gathered[:, None].to(wide) for part in (cos, sin))
    width = cosine.shape[-1]
    turned = x[..., :width].to(wide)
    first, second = turned.chunk(2, -1)
    turned = turned * cosine + torch.cat((-second, first), -1) * sine
    return torch.cat((turned.to(x.dtype), x[..., width:]), -1)


@triton.jit
def _rotate(
    x_ptr,  # [heads, D] of one token
    out_ptr,  # [heads, D] of one token, contiguous
    cos_1,  # [1, HALF], and so are the others
    cos_2,
    sin_1,
    sin_2,
    stride_h,
    heads,
    dim,
    half,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    source, target = x_ptr + head * stride_h, out_ptr + head * dim
    first = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + column + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        out_1 = first * cos_1 + second * sin_2
        out_2 = second * cos_2 - first * sin_1
    else:
        out_1 = first * cos_1 - second * sin_1
        out_2 = second * cos_2 + first * sin_2
    dtype = out_ptr.dtype.element_ty
    tl.store(target + column, out_1.to(dtype), mask=inside)
    tl.store(target + column + half, out_2.to(dtype), mask=inside)
    if REST > 0:
        beyond = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (beyond < dim)
        tl.store(target + beyond, tl.load(source + beyond, mask=inside), mask=inside)


@triton.jit
def _rotary_kernel(
    query_ptr,  # [B, heads, K, D], any strides but the last
    key_ptr,  # [B, heads, K, D], any strides but the last
    cos_ptr,  # [B or 1, T, R]
    sin_ptr,  # [B or 1, T, R]
    index_ptr,  # [B * K]
    query_out_ptr,  # [B, K, heads, D]
    key_out_ptr,  # [B, K, heads, D]
    query_stride_b,
    query_stride_h,
    query_stride_k,
    key_stride_b,
    key_stride_h,
    key_stride_k,
    table_stride_b,
    kept,
    query_heads,
    key_heads,
    dim,
    half,
    BACKWARD: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, slot = row // kept, row % kept
    column = tl.arange(0, HALF)[None, :]
    in_table = column < half
    table = batch * table_stride_b + tl.load(index_ptr + row) * (2 * half) + column
    cos_1 = tl.load(cos_ptr + table, mask=in_table, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + table + half, mask=in_table, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + table, mask=in_table, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + table + half, mask=in_table, other=0.0).to(tl.float32)
    _rotate(
        query_ptr + batch * query_stride_b + slot * query_stride_k,
        query_out_ptr + row * query_heads * dim,
        cos_1, cos_2, sin_1, sin_2,
        query_stride_h, query_heads, dim, half, BACKWARD, QUERY_HEADS, HALF, REST,
    )  # fmt: skip
    _rotate(
        key_ptr + batch * key_stride_b + slot * key_stride_k,
        key_out_ptr + row * key_heads * dim,
        cos_1, cos_2, sin_1, sin_2,
        key_stride_h, key_heads, dim, half, BACKWARD, KEY_HEADS, HALF, REST,
    )  # fmt: skip


def _launch(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, keep_index: Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    batch, _, kept, dim = query.shape
    # The layout of a projection's output, which is what attention kernels like best.
    outs = [
        torch.empty(batch, kept, x.shape[1], dim, dtype=x.dtype, device=x.device)
        for x in (query, key)
    ]
    if batch * kept:
        half = cos.shape[-1] // 2
        rest = dim - 2 * half
        with torch.cuda.device_of(query):
            _rotary_kernel[(batch * kept,)](
                query,
                key,
                cos,
                sin,
                keep_index,
                *outs,
                *query.stride()[:3],
                *key.stride()[:3],
                cos.stride(0) if cos.shape[0] > 1 else 0,
                kept,
                query.shape[1],
                key.shape[1],
                dim,
                half,
                BACKWARD=backward,
                QUERY_HEADS=triton.next_power_of_2(query.shape[1]),
                KEY_HEADS=triton.next_power_of_2(key.shape[1]),
                HALF=triton.next_power_of_2(half),
                REST=triton.next_power_of_2(rest) if rest else 0,
            )
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)


class _Rotary(Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin, keep_index):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin, keep_index)
        return _launch(query, key, cos, sin, keep_index, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key):
        cos, sin, keep_index = ctx.saved_tensors
        grads = _launch(grad_query, grad_key, cos, sin, keep_index, backward=True)
        return *grads, None, None, None


def rotary(query: Tensor, key: Tensor, cos: KeptRotary, sin: KeptRotary) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys of kept tokens by their positions in the whole sequence.

    Args:
        query: Queries, ``[B, heads, K, D]``, any float dtype.
        key: Keys, ``[B, key heads, K, D]``.
        cos: Table of the cosine, ``[B or 1, T, R]`` with R even and at most D, and the positions,
            ``[B, K]``.
        sin: Table and positions of the sine, likewise.

    Returns:
        Rotated queries and keys, in their shapes and dtypes; dimensions from R on are unchanged.
    """
    if not use_triton(query):
        return rotary_reference(query, cos, sin), rotary_reference(key, cos, sin)
    return _Rotary.apply(query, key, cos.table, sin.table, cos.keep_index)
