"""Rows in FP8: their quantisation, transposition and products.

Each row of a matrix has a scale of its own: its largest magnitude divided by the largest FP8 number
(e4m3, 448). The rows of both operands of a product run along the sum, the only order that the
matrix units of Hopper and later GPUs read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo_hf.kernels.launch import row_block, use_triton

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
_TINY = 1e-12  # a row of zeros has a scale too
_TILE = 64


def quantize_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise ``x`` to FP8, with a scale for each row.

    Args:
        x: Matrix, ``[N, K]``, any float dtype; copied first unless each row is contiguous.
        columns: Factors by which the columns are multiplied first, ``[K]`` fp32.

    Returns:
        Values, ``[N, K]`` float8_e4m3fn, and scales, ``[N, 1]`` fp32, whose product is about
        ``x * columns``. The scale of a row that is not finite throughout is not finite either.
    """
    if not use_triton(x):
        exact = x.float() if columns is None else x.float() * columns
        scales = exact.abs().amax(1, keepdim=True).clamp(min=_TINY) / LARGEST
        return (exact / scales).clamp(-LARGEST, LARGEST).to(FP8), scales
    rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    values = torch.empty(rows, width, device=x.device, dtype=FP8)
    scales = torch.empty(rows, 1, device=x.device, dtype=torch.float32)
    _quantize[(rows,)](
        x, columns, values, scales, width, x.stride(0), columns is not None, **row_block(width)
    )
    return values, scales


@triton.jit
def _quantize(x, columns, values, scales, width, stride, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    found = tl.load(x + row * stride + place, mask=inside, other=0).to(tl.float32)
    if SCALED:
        found *= tl.load(columns + place, mask=inside, other=0)
    # Magnitudes are ordered as their bits are, NaN last, which a maximum of floats would leave out.
    largest = tl.max(tl.abs(found).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    scale = tl.maximum(largest, 1e-12, propagate_nan=tl.PropagateNan.ALL) / 448.0
    tl.store(scales + row, scale)
    limited = tl.minimum(tl.maximum(found / scale, -448.0), 448.0)
    tl.store(values + row * width + place, limited.to(tl.float8e4nv), mask=inside)


def transposed(values: Tensor) -> Tensor:
    """The transpose ``[K, N]``, contiguous, of ``[N, K]`` float8_e4m3fn."""
    if not use_triton(values):
        return values.view(torch.uint8).mT.contiguous().view(FP8)
    rows, width = values.shape
    out = torch.empty(width, rows, device=values.device, dtype=torch.uint8)
    grid = (triton.cdiv(rows, _TILE), triton.cdiv(width, _TILE))
    _transpose[grid](values.view(torch.uint8), out, rows, width, _TILE)
    return out.view(FP8)


@triton.jit
def _transpose(values, out, rows, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    tile = tl.load(values + row[:, None] * width + column[None, :], mask=inside)
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def scaled_product(
    x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """``x @ y.mT`` of two matrices in FP8.

    Args:
        x: Values, ``[N, K]`` float8_e4m3fn, and scales of its rows, ``[N, 1]`` fp32.
        y: Values, ``[M, K]``, and scales, ``[M, 1]``, likewise.
        dtype: Dtype of the result.

    Returns:
        ``[N, M]``.
    """
    values, scales = y
    if not use_triton(values):
        return ((x[0].float() @ values.float().mT) * x[1] * scales.mT).to(dtype)
    return torch._scaled_mm(
        x[0], values.mT, scale_a=x[1], scale_b=scales.mT, out_dtype=dtype, use_fast_accum=True
    )
