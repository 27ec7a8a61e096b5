"""Reading and writing kept rows of the residual stream, in place, without permuting it.

A sparse sublayer reads the rows ``keep_index`` of the stream ``x``, computes their new values,
and stores them back at the same places. Eliminated tokens are never touched, so nothing is padded,
permuted or copied, and the backward needs one gradient stream instead of a dense ``[B, T, H]``
gradient a sublayer: what `put_rows_` reads from it, `take_rows` overwrites in it.

That contract ties the two together, so they are offered as one function, `update_rows`.

Memory traffic, in elements: reads B*K*H and writes B*K*H on each side (an out-of-place
gather / zero-pad / add reads and writes the whole stream besides).

Source: LeMo, arXiv:2501.09767, "permutation-free token movement".
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def flat_rows(keep_index: Tensor, num_tokens: int) -> Tensor:
    """Positions ``[B, K]`` within rows of T tokens as positions ``[B * K]`` among ``B * T``."""
    offsets = torch.arange(keep_index.shape[0], device=keep_index.device) * num_tokens
    return (keep_index + offsets[:, None]).flatten()


def gather_rows(x: Tensor, keep_index: Tensor) -> Tensor:
    """``x[b, keep_index[b]]`` for every ``b``: ``[B, T, H]`` and ``[B, K]`` give ``[B, K, H]``."""
    flat = flat_rows(keep_index, x.shape[1])
    return x.flatten(0, 1).index_select(0, flat).view(*keep_index.shape, *x.shape[2:])


def scatter_rows_(x: Tensor, rows: Tensor, keep_index: Tensor, slot_mask: Tensor | None) -> None:
    """Store ``rows [B, K, H]`` at ``keep_index`` of ``x``, in place; idle slots change nothing."""
    if slot_mask is not None:
        rows = torch.where(slot_mask[..., None], rows, gather_rows(x, keep_index))
    x.flatten(0, 1).index_copy_(0, flat_rows(keep_index, x.shape[1]), rows.flatten(0, 1))


class _TakeRows(Function):
    @staticmethod
    def forward(ctx, x, keep_index, slot_mask):
        ctx.mark_dirty(x)  # hands the same stream on, so that its gradient passes through here
        ctx.save_for_backward(keep_index, slot_mask)
        return x, gather_rows(x, keep_index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_rows):
        keep_index, slot_mask = ctx.saved_tensors
        # The rows' own gradient already holds the residual path, so it replaces what stood there.
        scatter_rows_(grad_x, grad_rows, keep_index, slot_mask)
        return grad_x, None, None


class _PutRows(Function):
    @staticmethod
    def forward(ctx, x, rows, keep_index, slot_mask):
        ctx.mark_dirty(x)
        ctx.save_for_backward(keep_index, slot_mask)
        scatter_rows_(x, rows.to(x.dtype), keep_index, slot_mask)
        ctx.rows_dtype = rows.dtype
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x):
        keep_index, slot_mask = ctx.saved_tensors
        grad_rows = gather_rows(grad_x, keep_index)
        if slot_mask is not None:
            grad_rows = grad_rows * slot_mask[..., None]
        return grad_x, grad_rows.to(ctx.rows_dtype), None, None


class _CloseStream(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x):
        # The gradient that arrives may be shared or expanded; from here on it is changed in place.
        return grad_x.clone(memory_format=torch.contiguous_format)


def open_stream(x: Tensor) -> Tensor:
    """A contiguous copy of ``x [B, T, H]``, to be updated in place; the caller's stays whole."""
    return x.clone(memory_format=torch.contiguous_format)


def close_stream(x: Tensor) -> Tensor:
    """Marks the end of a run of in-place updates; its backward starts the gradient stream."""
    return _CloseStream.apply(x)


def update_rows(
    x: Tensor,
    keep_index: Tensor,
    fn: Callable[[Tensor], Tensor],
    slot_mask: Tensor | None = None,
) -> Tensor:
    """Replace the rows ``keep_index`` of the stream by ``fn`` of them, in place.

    Args:
        x: Residual stream, ``[B, T, H]``, contiguous, any float dtype. Changed in place; must come
            from `open_stream` or from another `update_rows`, and its last user must be
            `close_stream`.
        keep_index: Token positions, ``[B, K]``, int64, distinct within a row, ``0 <= i < T``.
        fn: Maps the kept rows ``[B, K, H]`` to their new values, same shape, residual included.
        slot_mask: ``[B, K]`` bool or None. Where False the slot is idle: ``fn`` sees its row, but
            the stream and the gradients are left as if it did not.

    Returns:
        ``x`` itself. Rows outside ``keep_index`` are untouched and so is their gradient.

    Raises:
        ValueError: ``x`` is not contiguous or the batch sizes differ.
    """
    if not x.is_contiguous() or x.dim() != 3:
        raise ValueError(f"the stream must be a contiguous [B, T, H] tensor, got {tuple(x.shape)}")
    if keep_index.dim() != 2 or keep_index.shape[0] != x.shape[0]:
        raise ValueError(
            f"keep_index must be [B, K] with B = {x.shape[0]}, got {tuple(keep_index.shape)}"
        )
    x, rows = _TakeRows.apply(x, keep_index, slot_mask)
    return _PutRows.apply(x, fn(rows), keep_index, slot_mask)
