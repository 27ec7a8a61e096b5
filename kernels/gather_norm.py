"""Read the kept rows of the stream and normalise them, in one pass; add and normalise in one pass.

`gather_norm` opens a sublayer: it reads the rows, keeps a copy (the stream changes before the
backward) and normalises them. Its backward overwrites the rows of the gradient stream, in place.
`add_norm` stands between two sublayers that share their rows: residual addition and norm.

Memory traffic, in elements: `gather_norm` reads K*H and writes 2*K*H, backward reads 3*K*H and
writes K*H; `add_norm` reads and writes 2*K*H, backward the same as above. Rounds once, at the end.

Source: LeMo, arXiv:2501.09767, "permutation-free token movement"; RMSNorm, arXiv:1910.07467.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.kernels.launch import row_block, use_triton
from lemo_hf.kernels.rows import check_stream, gather_rows, store_rows_

# "rms_plus_one" scales by 1 + weight (Gemma).
KINDS = {"rms": 1, "rms_plus_one": 2, "layer": 3}
PARTIALS = 264  # programs that sum a share of the weight's gradient each: two a multiprocessor
STAGES = 3  # rows that such a program has in flight


class Norm(NamedTuple):
    """A norm over the last dimension: one of `KINDS`, ``weight [H]``, ``bias [H]`` or None, eps."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


def norm_reference(rows: Tensor, norm: Norm) -> Tensor:
    """``rows [..., H]`` normalised; arithmetic in fp32 (fp64 for fp64), rounded once."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    weight = norm.weight.to(wide.dtype)
    wide = wide * (1 + weight if norm.kind == "rms_plus_one" else weight)
    if norm.bias is not None:
        wide = wide + norm.bias.to(wide.dtype)
    return wide.to(_out_dtype(rows, norm))


def _out_dtype(rows: Tensor, norm: Norm) -> torch.dtype:
    """As in transformers: a Llama norm with an fp32 weight widens its input, a Gemma norm never."""
    if norm.kind == "rms":
        return torch.promote_types(rows.dtype, norm.weight.dtype)
    return rows.dtype


@triton.jit
def _gather_norm_forward(
    x_ptr,  # [B, T, H] if HAS_INDEX, else [B * K, H]
    update_ptr,  # [B * K, H]
    index_ptr,  # [B * K]
    slots_ptr,  # [B * K], 0 at idle slots, whose rows read as 0
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    rows_ptr,  # [B * K, H], out
    hidden_ptr,  # [B * K, H], out
    scale,
    eps,
    kept,
    tokens,
    width,
    KIND: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    source = row
    if HAS_INDEX:
        source = row // kept * tokens + tl.load(index_ptr + row)
    readable = inside
    if HAS_SLOTS:
        readable = columns < width * tl.load(slots_ptr + row)
    value = tl.load(x_ptr + source * width + columns, mask=readable, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        update = tl.load(update_ptr + row * width + columns, mask=inside, other=0.0)
        value += scale * update.to(tl.float32)
    if WRITE_ROWS:
        rounded = value.to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + row * width + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if KIND > 0:
        if KIND == 3:
            mean = tl.sum(value, axis=0) / width
            value = tl.where(inside, value - mean, 0.0)
        value *= tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if KIND == 2:
            weight += 1.0
        value *= weight
        if HAS_BIAS:
            value += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        hidden = value.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + row * width + columns, hidden, mask=inside)


@triton.jit
def _gather_norm_backward(
    grad_rows_ptr,  # [B * K, H], None if not HAS_GRAD_ROWS
    grad_hidden_ptr,  # [B * K, H]
    rows_ptr,  # [B * K, H]
    index_ptr,  # [B * K]
    slots_ptr,  # [B * K]
    weight_ptr,  # [H]
    out_ptr,  # [B, T, H] gradient stream if HAS_INDEX, else [B * K, H]
    grad_weight_ptr,  # [programs, H] fp32
    grad_bias_ptr,  # [programs, H] fp32
    eps,
    num_rows,
    kept,
    tokens,
    width,
    KIND: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_GRAD_ROWS: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.zeros((BLOCK,), tl.float32)
    if KIND > 0:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == 2:
        weight += 1.0
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(program, num_rows, tl.num_programs(0), num_stages=STAGES):
        grad = tl.zeros((BLOCK,), tl.float32)
        if KIND > 0:
            value = tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0)
            value = value.to(tl.float32)
            if KIND == 3:
                value = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
            rstd = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
            value *= rstd
            hidden = tl.load(grad_hidden_ptr + row * width + columns, mask=inside, other=0.0)
            hidden = hidden.to(tl.float32)
            if GRAD_WEIGHT:
                grad_weight += hidden * value
            if GRAD_BIAS:
                grad_bias += hidden
            grad = hidden * weight
            projection = value * (tl.sum(grad * value, axis=0) / width)
            if KIND == 3:
                projection += tl.sum(grad, axis=0) / width
            grad = rstd * (grad - projection)
        if HAS_GRAD_ROWS:
            straight = tl.load(grad_rows_ptr + row * width + columns, mask=inside, other=0.0)
            grad += straight.to(tl.float32)
        target = row
        writable = inside
        if HAS_INDEX:
            target = row // kept * tokens + tl.load(index_ptr + row)
        if HAS_SLOTS:
            writable = columns < width * tl.load(slots_ptr + row)
        out = grad.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + target * width + columns, out, mask=writable)
    if GRAD_WEIGHT:
        tl.store(grad_weight_ptr + program * width + columns, grad_weight, mask=inside)
    if GRAD_BIAS:
        tl.store(grad_bias_ptr + program * width + columns, grad_bias, mask=inside)


def launch_forward(
    x: Tensor,  # [B, T, H] with an index, else [B, K, H]
    keep_index: Tensor | None,  # [B, K]
    norm: Norm | None,
    *,
    update: Tensor | None = None,  # [B, K, H]
    scale: float = 1.0,
    slot_mask: Tensor | None = None,  # idle slots read 0
    write_rows: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``rows = x[keep_index] + scale * update`` and their norm; each None if not asked for."""
    shape = (*(x if keep_index is None else keep_index).shape[:2], x.shape[2])
    new = partial(torch.empty, shape, device=x.device)
    rows = new(dtype=x.dtype) if write_rows else None
    hidden = None if norm is None else new(dtype=_out_dtype(x, norm))
    num_rows = shape[0] * shape[1]
    if num_rows:
        with torch.cuda.device_of(x):
            _gather_norm_forward[(num_rows,)](
                x,
                update,
                keep_index,
                None if slot_mask is None else slot_mask.view(torch.uint8),
                norm and norm.weight,
                norm and norm.bias,
                rows,
                hidden,
                scale,
                norm.eps if norm else 0.0,
                shape[1],
                x.shape[1],
                shape[2],
                KIND=KINDS[norm.kind] if norm else 0,
                HAS_INDEX=keep_index is not None,
                HAS_SLOTS=slot_mask is not None,
                HAS_UPDATE=update is not None,
                HAS_BIAS=norm is not None and norm.bias is not None,
                WRITE_ROWS=write_rows,
                **row_block(shape[2]),
            )
    return rows, hidden


def launch_backward(
    grad_rows: Tensor | None,  # [B, K, H]
    grad_hidden: Tensor | None,  # [B, K, H]
    rows: Tensor | None,  # [B, K, H]
    norm: Norm | None,
    out: Tensor,  # [B, T, H] with an index, else [B, K, H]; written
    keep_index: Tensor | None = None,
    slot_mask: Tensor | None = None,  # idle slots are not written
    grad_weight: bool = False,
    grad_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradient of the rows to ``out``; return those of weight and bias."""
    batch, kept, width = (grad_hidden if grad_rows is None else grad_rows).shape
    num_rows = batch * kept
    programs = min(num_rows, PARTIALS) if grad_weight or grad_bias else num_rows
    partials = [
        torch.empty(programs, width, dtype=torch.float32, device=out.device) if wanted else None
        for wanted in (grad_weight, grad_bias)
    ]
    if num_rows:
        with torch.cuda.device_of(out):
            _gather_norm_backward[(programs,)](
                grad_rows,
                grad_hidden,
                rows,
                keep_index,
                None if slot_mask is None else slot_mask.view(torch.uint8),
                norm and norm.weight,
                out,
                *partials,
                norm.eps if norm else 0.0,
                num_rows,
                kept,
                out.shape[1],
                width,
                KIND=KINDS[norm.kind] if norm else 0,
                HAS_INDEX=keep_index is not None,
                HAS_SLOTS=slot_mask is not None,
                HAS_GRAD_ROWS=grad_rows is not None,
                GRAD_WEIGHT=grad_weight,
                GRAD_BIAS=grad_bias,
                STAGES=STAGES if grad_weight or grad_bias else 1,
                **row_block(width),
            )
    return tuple(p if p is None else p.sum(0).to(norm.weight.dtype) for p in partials)


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
        norm: How to normalise, or None: the rows alone.
        slot_mask: ``[B, K]`` bool or None. Where False the slot is idle: its row is read, but the
            gradient stream is left as if it were not.

    Returns:
        ``x`` itself, to be used from here on; a copy of the rows, ``[B, K, H]``; their norm,
        ``[B, K, H]``, None without a ``norm``.

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
    """``rows + scale * update`` and the norm of that.

    Args:
        rows: ``[B, K, H]``, any float dtype.
        update: ``[B, K, H]``, or None for 0.
        norm: How to normalise.
        scale: Of the update (Granite's residual multiplier).

    Returns:
        The sum, ``[B, K, H]`` in the dtype of ``rows`` (``rows`` itself without an update), and
        its norm.
    """
    if not use_triton(rows):
        rows = rows if update is None else (rows + scale * update).to(rows.dtype)
        return rows, norm_reference(rows, norm)
    update = update if update is None else update.contiguous()
    return _AddNorm.apply(
        rows.contiguous(), update, scale, norm.weight, norm.bias, norm.kind, norm.eps
    )
