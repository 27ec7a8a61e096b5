"""Kernels of norms over the last dimension, fused with the operations around them.

One kernel reads rows (by index, if there is one), adds an update, and writes sum and norm; another
does the backward. `gather_norm` and `add_norm` are differentiable functions made of them, and
`scatter_add_` uses them for its gradient. All arithmetic is fp32 and rounds once, at the end.

Source: RMSNorm, arXiv:1910.07467; LayerNorm, arXiv:1607.06450.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo_hf.kernels.launch import row_block

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
    return wide.to(norm_dtype(rows, norm))


def norm_dtype(rows: Tensor, norm: Norm) -> torch.dtype:
    """Dtype of a norm's result; as in transformers, fp32 weights widen it in Llama, never in
    Gemma."""
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
    hidden = None if norm is None else new(dtype=norm_dtype(x, norm))
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
    """Write the gradient of the rows to ``out``. Returns those of weight and bias."""
    grad = grad_hidden if grad_rows is None else grad_rows
    assert grad is not None  # one of the two is given
    batch, kept, width = grad.shape
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
    weight, bias = (
        None if p is None or norm is None else p.sum(0).to(norm.weight.dtype) for p in partials
    )
    return weight, bias
