"""Read the kept rows of the stream and normalise them, in one pass; add and normalise in one pass.

`gather_norm` opens a sublayer: it reads the rows, keeps a copy (the stream changes before the
backward) and normalises them. Its backward overwrites the rows of the gradient stream, in place.
`add_norm` stands between two sublayers that share their rows: residual addition and norm.

Memory traffic, in elements: `gather_norm` reads K*H and writes 2*K*H, backward reads 3*K*H and
writes K*H; `add_norm` reads and writes 2*K*H, backward the same as above. Rounds once, at the end.

Source: LeMo, arXiv:2501.09767, "permutation-free token movement"; RMSNorm, arXiv:1910.07467.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.kernels.launch import use_triton
from lemo_hf.kernels.norm import Norm, launch_backward, launch_forward, norm_reference
from lemo_hf.kernels.rows import add_update, check_stream, gather_rows, store_rows_


class _GatherNorm(Function):
    @staticmethod
    def forward(ctx, x, keep_index, slot_mask, weight, bias, kind, eps):
        ctx.mark_dirty(x)  # hands the same stream on, so that its gradient passes through here
        ctx.norm = (kind, eps)
        norm = Norm(kind, weight, bias, eps)
        rows, hidden = launch_forward(x, keep_index, norm)
        ctx.save_for_backward(rows, keep_index, slot_mask, weight, bias)
        return x, rows, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_rows, grad_hidden):
        rows, keep_index, slot_mask, weight, bias = ctx.saved_tensors
        norm = Norm(ctx.norm[0], weight, bias, ctx.norm[1])
        # The rows' own gradient already holds the residual path, so it replaces what stood there.
        grads = launch_backward(
            grad_rows.contiguous(),
            grad_hidden.contiguous(),
            rows,
            norm,
            grad_x,
            keep_index,
            slot_mask,
            *ctx.needs_input_grad[3:5],
        )
        return grad_x, None, None, *grads, None, None


class _TakeRows(Function):
    """`_GatherNorm` without a norm; on any device."""

    @staticmethod
    def forward(ctx, x, keep_index, slot_mask):
        ctx.mark_dirty(x)
        ctx.save_for_backward(keep_index, slot_mask)
        if use_triton(x):
            return x, launch_forward(x, keep_index, None)[0]
        return x, gather_rows(x, keep_index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_rows):
        keep_index, slot_mask = ctx.saved_tensors
        if use_triton(grad_x):
            launch_backward(grad_rows.contiguous(), None, None, None, grad_x, keep_index, slot_mask)
        else:
            store_rows_(grad_x, grad_rows, keep_index, slot_mask)
        return grad_x, None, None


class _AddNorm(Function):
    @staticmethod
    def forward(ctx, rows, update, scale, weight, bias, kind, eps):
        norm = Norm(kind, weight, bias, eps)
        total, hidden = launch_forward(
            rows, None, norm, update=update, scale=scale, write_rows=update is not None
        )
        ctx.set_materialize_grads(False)  # the sum of an output norm is not used
        ctx.norm, ctx.scale = (kind, eps), scale
        ctx.update_dtype = None if update is None else update.dtype
        ctx.save_for_backward(rows if update is None else total, weight, bias)
        # Rows without an update are handed on as well, so that their gradients meet here.
        return rows if update is None else total, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_hidden):
        rows, weight, bias = ctx.saved_tensors
        norm = Norm(ctx.norm[0], weight, bias, ctx.norm[1])
        grad_rows = torch.empty_like(rows)
        if grad_hidden is None:
            grad_hidden = rows.new_zeros(rows.shape)
        grad_weight, grad_bias = launch_backward(
            None if grad_total is None else grad_total.contiguous(),
            grad_hidden.contiguous(),
            rows,
            norm,
            grad_rows,
            grad_weight=ctx.needs_input_grad[3],
            grad_bias=ctx.needs_input_grad[4],
        )
        grad_update = None
        if ctx.update_dtype is not None:
            grad_update = grad_rows if ctx.scale == 1 else grad_rows * ctx.scale
            grad_update = grad_update.to(ctx.update_dtype)
        return grad_rows, grad_update, None, grad_weight, grad_bias, None, None


def gather_norm(
    x: Tensor, keep_index: Tensor, norm: Norm | None, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kept rows of a stream, and their norm.

    Args:
        x: Residual stream, ``[B, T, H]``, contiguous, any float dtype. Must come from
            `open_stream` or `scatter_add_`; the rows must go back by `scatter_add_`.
        keep_index: Token positions, ``[B, K]``, int64, distinct within a row, ``0 <= i < T``.
        norm: Norm to apply; None: the rows alone.
        slot_mask: Mask of slots, ``[B, K]`` bool, or None. False marks an idle slot: its row is
            read, but does not change the gradient stream.

    Returns:
        ``x`` itself, to be used from here on; a copy of the rows, ``[B, K, H]``; their norm,
        ``[B, K, H]``, or None without ``norm``.

    Raises:
        ValueError: ``x`` is not contiguous, the batch sizes differ, or H exceeds 65536.
    """
    check_stream(x, keep_index)
    if norm is None:
        return *_TakeRows.apply(x, keep_index, slot_mask), None
    if not use_triton(x):
        x, rows = _TakeRows.apply(x, keep_index, slot_mask)
        return x, rows, norm_reference(rows, norm)
    return _GatherNorm.apply(x, keep_index, slot_mask, norm.weight, norm.bias, norm.kind, norm.eps)


def add_norm(
    rows: Tensor, update: Tensor | None, norm: Norm, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``rows + scale * update``, and its norm.

    Args:
        rows: Kept rows, ``[B, K, H]``, any float dtype.
        update: Update of the rows, ``[B, K, H]``, or None for 0.
        norm: Norm to apply.
        scale: Factor of the update (Granite's residual multiplier).

    Returns:
        The sum, ``[B, K, H]`` in the dtype of ``rows`` (``rows`` itself without an update), and
        its norm.
    """
    if not use_triton(rows):
        rows = add_update(rows, update, scale).to(rows.dtype)
        return rows, norm_reference(rows, norm)
    update = update if update is None else update.contiguous()
    return _AddNorm.apply(
        rows.contiguous(), update, scale, norm.weight, norm.bias, norm.kind, norm.eps
    )
