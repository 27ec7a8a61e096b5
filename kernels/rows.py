"""The residual stream, updated in place, and its rows.

A sparse sublayer reads the rows ``keep_index`` of the stream ``x [B, T, H]`` (`gather_norm`), and
stores the results at the same places (`scatter_add_`). Tokens that are left out are never touched,
so nothing is padded, permuted or copied. The backward needs one gradient stream instead of a dense
``[B, T, H]`` gradient for each sublayer: `scatter_add_` reads rows from it, and `gather_norm`
overwrites the same rows in it.

Source: LeMo, arXiv:2501.09767, "permutation-free token movement".
"""

from torch import Tensor, arange
from torch import contiguous_format as _contiguous
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def flat_rows(keep_index: Tensor, num_tokens: int) -> Tensor:
    """Positions ``[B, K]`` within rows of T tokens as positions ``[B * K]`` among ``B * T``."""
    offsets = arange(keep_index.shape[0], device=keep_index.device) * num_tokens
    return (keep_index + offsets[:, None]).flatten()


def gather_rows(x: Tensor, keep_index: Tensor) -> Tensor:
    """``x[b, keep_index[b]]`` for every ``b``: ``[B, T, H]`` and ``[B, K]`` give ``[B, K, H]``."""
    flat = flat_rows(keep_index, x.shape[1])
    return x.flatten(0, 1).index_select(0, flat).view(*keep_index.shape, *x.shape[2:])


def store_rows_(x: Tensor, rows: Tensor, keep_index: Tensor, slot_mask: Tensor | None) -> None:
    """Store ``rows [B, K, H]`` at ``keep_index`` of ``x``, in place; idle slots change nothing."""
    if slot_mask is not None:
        rows = rows.where(slot_mask[..., None], gather_rows(x, keep_index))
    flat = flat_rows(keep_index, x.shape[1])
    x.flatten(0, 1).index_copy_(0, flat, rows.to(x.dtype).flatten(0, 1))


def add_update(rows: Tensor, update: Tensor | None, scale: float) -> Tensor:
    """``rows + scale * update``, both ``[B, K, H]``; None adds nothing."""
    if update is None:
        return rows
    return rows + (update if scale == 1 else update * scale)


def open_stream(x: Tensor) -> Tensor:
    """A contiguous copy of ``x [B, T, H]``, to be updated in place; the caller's tensor does not
    change."""
    return x.clone(memory_format=_contiguous)


def own_stream(x: Tensor) -> Tensor:
    """A tensor in the memory of ``x [B, T, H]``, to be updated in place where autograd forbids it
    for ``x`` itself, a view that a Function with several outputs returned. Nobody may read ``x``
    after that."""
    return _OwnStream.apply(x)


def close_stream(x: Tensor) -> Tensor:
    """Mark the end of a run of in-place updates; its backward starts the gradient stream."""
    return _CloseStream.apply(x)


def check_stream(x: Tensor, keep_index: Tensor) -> None:
    """Check a stream and the index of its kept rows.

    Raises:
        ValueError: ``x`` is not a contiguous ``[B, T, H]``, or ``keep_index`` not a ``[B, K]``.
    """
    if not x.is_contiguous() or x.dim() != 3:
        raise ValueError(f"the stream must be a contiguous [B, T, H] tensor, got {tuple(x.shape)}")
    if keep_index.dim() != 2 or keep_index.shape[0] != x.shape[0]:
        raise ValueError(
            f"keep_index must be [B, K] with B = {x.shape[0]}, got {tuple(keep_index.shape)}"
        )


class _OwnStream(Function):
    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x):
        return grad_x


class _CloseStream(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x):
        # The gradient that arrives may be shared or expanded; from here on it is changed in place.
        return grad_x.clone(memory_format=_contiguous)
