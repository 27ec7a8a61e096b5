"""Store rows plus an update at the kept places of the stream, in place.

Indices are distinct, so these are plain stores: no atomics, two runs are bit-equal.

Memory traffic, in elements: reads 2*K*H, writes K*H; the backward reads and writes K*H (a
zero-padded update added to the stream reads 2*T*H and writes 2*T*H besides).

Source: LeMo, arXiv:2501.09767, "permutation-free token movement".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.kernels.launch import row_block, use_triton
from lemo_hf.kernels.norm import launch_forward
from lemo_hf.kernels.rows import (
    add_update,
    check_stream,
    flat_rows,
    gather_rows,
    store_rows_,
)


def scatter_add_reference(
    x: Tensor,
    rows: Tensor,
    update: Tensor | None,
    keep_index: Tensor,
    slot_mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`scatter_add_` out of place."""
    rows = add_update(rows, update, scale).to(x.dtype)
    if slot_mask is not None:
        rows = rows.where(slot_mask[..., None], gather_rows(x, keep_index))
    flat = flat_rows(keep_index, x.shape[1])
    return x.flatten(0, 1).index_copy(0, flat, rows.flatten(0, 1)).view_as(x)


@triton.jit
def _scatter_kernel(
    x_ptr,  # [B, T, H], written
    rows_ptr,  # [B * K, H]
    update_ptr,  # [B * K, H]
    index_ptr,  # [B * K]
    slots_ptr,  # [B * K], 0 at idle slots, which are not stored
    scale,
    kept,
    tokens,
    width,
    HAS_UPDATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        update = tl.load(update_ptr + row * width + columns, mask=inside, other=0.0)
        value += scale * update.to(tl.float32)
    writable = inside
    if HAS_SLOTS:
        writable = columns < width * tl.load(slots_ptr + row)
    target = row // kept * tokens + tl.load(index_ptr + row)
    tl.store(x_ptr + target * width + columns, value.to(x_ptr.dtype.element_ty), mask=writable)


class _ScatterAdd(Function):
    @staticmethod
    def forward(ctx, x, rows, update, keep_index, slot_mask, scale):
        ctx.mark_dirty(x)
        ctx.save_for_backward(keep_index, slot_mask)
        ctx.scale = scale
        ctx.dtypes = rows.dtype, None if update is None else update.dtype
        if not use_triton(x):
            store_rows_(x, add_update(rows, update, scale), keep_index, slot_mask)
            return x
        if keep_index.numel():
            with torch.cuda.device_of(x):
                _scatter_kernel[(keep_index.numel(),)](
                    x,
                    rows,
                    update,
                    keep_index,
                    None if slot_mask is None else slot_mask.view(torch.uint8),
                    scale,
                    keep_index.shape[1],
                    x.shape[1],
                    x.shape[2],
                    HAS_UPDATE=update is not None,
                    HAS_SLOTS=slot_mask is not None,
                    **row_block(x.shape[2]),
                )
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x):
        keep_index, slot_mask = ctx.saved_tensors
        if use_triton(grad_x):
            grad, _ = launch_forward(grad_x, keep_index, None, slot_mask=slot_mask)
            assert grad is not None  # rows are written unless it is told otherwise
        else:
            grad = gather_rows(grad_x, keep_index)
            grad = grad if slot_mask is None else grad * slot_mask[..., None]
        rows_dtype, update_dtype = ctx.dtypes
        grad_update = None
        if update_dtype is not None:
            grad_update = grad if ctx.scale == 1 else grad * ctx.scale
            grad_update = grad_update.to(update_dtype)
        return grad_x, grad.to(rows_dtype), grad_update, None, None, None


def scatter_add_(
    x: Tensor,
    rows: Tensor,
    update: Tensor | None,
    keep_index: Tensor,
    slot_mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``x[keep_index] = rows + scale * update``, in place.

    Args:
        x: Residual stream, ``[B, T, H]``, contiguous, any float dtype; what `gather_norm` returned.
        rows: Rows that `gather_norm` or `add_norm` returned, ``[B, K, H]``, so that the sum is
            residual plus update.
        update: Update of the rows, ``[B, K, H]``, any float dtype, or None for 0.
        keep_index: Index of `gather_norm`, ``[B, K]`` int64.
        slot_mask: Mask of `gather_norm`, ``[B, K]`` bool, or None; idle slots are not stored, and
            their gradient is 0.
        scale: Factor of the update (Granite's residual multiplier).

    Returns:
        ``x`` itself. Rows outside ``keep_index`` are untouched and so is their gradient.

    Raises:
        ValueError: ``x`` is not contiguous or the batch sizes differ.
    """
    check_stream(x, keep_index)
    update = update if update is None else update.contiguous()
    return _ScatterAdd.apply(x, rows.contiguous(), update, keep_index, slot_mask, scale)
