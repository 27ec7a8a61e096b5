"""Rotary position embedding at kept positions, reading cos and sin of the whole sequence.

One pass over queries and one over keys; no gathered cos and sin, no rotated copy.

Memory traffic, in elements: reads and writes K*heads*D, cos and sin come from the cache (unfused:
five times that, for the products, the rotated halves and their sum).

Source: RoFormer, arXiv:2104.09864, in the half-rotation layout of transformers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.kernels.launch import use_triton
from lemo_hf.kernels.rows import gather_rows


class KeptRotary(NamedTuple):
    """``table [B or 1, T, R]`` (cos or sin) at the positions ``keep_index [B, K]``."""

    table: Tensor
    keep_index: Tensor

    def gathered(self) -> Tensor:
        """``[B, K, R]``, for attention modules that read cos and sin themselves."""
        return gather_rows(self.table.expand(len(self.keep_index), -1, -1), self.keep_index)


def rotary_reference(x: Tensor, cos: KeptRotary, sin: KeptRotary) -> Tensor:
    """``x [B, heads, K, D]`` with its first R dimensions rotated; rounds once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.gathered()[:, None].to(wide) for part in (cos, sin))
    width = cos.shape[-1]
    turned = x[..., :width].to(wide)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(x.dtype), x[..., width:]), -1)


@triton.jit
def _rotary_kernel(
    x_ptr,  # [B, heads, K, D], any strides but the last
    cos_ptr,  # [B or 1, T, R]
    sin_ptr,  # [B or 1, T, R]
    index_ptr,  # [B * K]
    out_ptr,  # [B, K, heads, D]
    stride_b,
    stride_h,
    stride_k,
    table_stride_b,
    kept,
    heads,
    dim,
    half,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, slot = row // kept, row % kept
    position = tl.load(index_ptr + row)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    in_table = column < half
    inside = (head < heads) & in_table
    table = batch * table_stride_b + position * (2 * half) + column
    cos_1 = tl.load(cos_ptr + table, mask=in_table, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + table + half, mask=in_table, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + table, mask=in_table, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + table + half, mask=in_table, other=0.0).to(tl.float32)
    source = x_ptr + batch * stride_b + slot * stride_k + head * stride_h
    target = out_ptr + (row * heads + head) * dim
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


def _launch(x: Tensor, cos: Tensor, sin: Tensor, keep_index: Tensor, backward: bool) -> Tensor:
    batch, heads, kept, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    # The layout of a projection's output, which is what attention kernels like best.
    out = torch.empty(batch, kept, heads, dim, dtype=x.dtype, device=x.device)
    if out.numel():
        half = cos.shape[-1] // 2
        rest = dim - 2 * half
        with torch.cuda.device_of(x):
            _rotary_kernel[(batch * kept,)](
                x,
                cos,
                sin,
                keep_index,
                out,
                *x.stride()[:3],
                cos.stride(0) if cos.shape[0] > 1 else 0,
                kept,
                heads,
                dim,
                half,
                BACKWARD=backward,
                HEADS=triton.next_power_of_2(heads),
                HALF=triton.next_power_of_2(half),
                REST=triton.next_power_of_2(rest) if rest else 0,
            )
    return out.transpose(1, 2)


class _Rotary(Function):
    @staticmethod
    def forward(ctx, x, cos, sin, keep_index):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin, keep_index)
        return _launch(x, cos, sin, keep_index, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _launch(grad, *ctx.saved_tensors, backward=True), None, None, None


def rotary(x: Tensor, cos: KeptRotary, sin: KeptRotary) -> Tensor:
    """Rotate queries or keys of kept tokens by their positions in the whole sequence.

    Args:
        x: ``[B, heads, K, D]``, any float dtype.
        cos: ``[B or 1, T, R]`` with R even and at most D, and the ``[B, K]`` positions.
        sin: The same of the sine.

    Returns:
        Shape and dtype of ``x``; dimensions from R on are unchanged.
    """
    if not use_triton(x):
        return rotary_reference(x, cos, sin)
    return _Rotary.apply(x, cos.table, sin.table, cos.keep_index)
