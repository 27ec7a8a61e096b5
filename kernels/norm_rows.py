"""The norm of some rows of the stream, in their places; all other rows stay unchanged."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.kernels.norm import Norm
from lemo_hf.kernels.segment_cross_entropy import read_rows, trained_parameters, write_gradient


class _NormRows(Function):
    @staticmethod
    def forward(ctx, x, index, norm, *parameters):
        rows, normed = read_rows(x.detach().flatten(0, 1), index, norm)
        x.flatten(0, 1).index_copy_(0, index, normed)
        ctx.mark_dirty(x)
        ctx.save_for_backward(rows, index)
        ctx.norm = norm
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x):
        rows, index = ctx.saved_tensors
        out = torch.zeros(grad_x.shape, dtype=rows.dtype, device=rows.device)
        grad = grad_x.flatten(0, 1).index_select(0, index)
        found = write_gradient(out.flatten(0, 1), index, rows, grad, ctx.norm)
        parameters = trained_parameters(ctx.norm)
        found = [x.to(p.dtype) for x, p in zip(found, parameters, strict=True)]
        return out, None, None, *found


def norm_rows_(x: Tensor, index: Tensor, norm: Norm) -> Tensor:
    """``x [B, T, H]``, contiguous, with its rows ``index [S]`` (of B * T) replaced by their norm.

    Do not read other rows of the result: they get no gradient. The backward's gradient is a new
    tensor, which may be updated in place.
    """
    return _NormRows.apply(x, index, norm, *trained_parameters(norm))
