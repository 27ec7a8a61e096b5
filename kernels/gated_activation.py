"""``activation(gate) * up`` of a gated MLP, whose backward recomputes instead of storing.

It works on the outputs of the gate and up *modules*, so adapters and quantised weights work, and
stores only these two (unfused: the activation as well).

Memory traffic, in elements: reads 2*K*I and writes K*I; the backward reads 3*K*I, writes 2*K*I.

Source: SwiGLU and GEGLU, arXiv:2002.05202.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.kernels.launch import use_triton

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
# Elements of a row that a program takes, at most: on an H200 whole rows of 14,336 were the fastest.
BLOCK = 16384


def gated_activation_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``; arithmetic in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    functional = torch.nn.functional
    if activation == "silu":
        active = functional.silu(gate.to(wide))
    else:
        form = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
        active = functional.gelu(gate.to(wide), approximate=form)
    return (active * up.to(wide)).to(gate.dtype)


@triton.jit
def _sigmoid(x):
    """``sigmoid(x)`` and ``1 - sigmoid(x)``, each without cancellation or overflow."""
    small = tl.exp(-tl.abs(x))
    high = 1.0 / (1.0 + small)
    low = small * high
    return tl.where(x >= 0, high, low), tl.where(x >= 0, low, high)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of ``x`` and its derivative."""
    if ACTIVATION == 0:
        share, rest = _sigmoid(x)
        slope = share * (1.0 + x * rest)
    elif ACTIVATION == 1:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        share, rest = _sigmoid(inner)  # (1 + tanh(inner / 2)) / 2
        slope = share + x * share * rest * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * share, slope


@triton.jit
def _gated_forward(
    gate_ptr,  # [R, I]
    up_ptr,  # [R, I]
    out_ptr,  # [R, I], contiguous
    gate_stride,
    up_stride,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0)
    value, _ = _activate(gate.to(tl.float32), ACTIVATION)
    value *= up.to(tl.float32)
    tl.store(out_ptr + row * width + columns, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    grad_ptr,  # [R, I], contiguous
    gate_ptr,  # [R, I]
    up_ptr,  # [R, I]
    grad_gate_ptr,  # [R, I], contiguous
    grad_up_ptr,  # [R, I], contiguous
    gate_stride,
    up_stride,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate.to(tl.float32), ACTIVATION)
    target = row * width + columns
    grad_gate = (grad * up * slope).to(grad_gate_ptr.dtype.element_ty)
    grad_up = (grad * value).to(grad_up_ptr.dtype.element_ty)
    tl.store(grad_gate_ptr + target, grad_gate, mask=inside)
    tl.store(grad_up_ptr + target, grad_up, mask=inside)


class _GatedActivation(Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = ACTIVATIONS[activation]
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch(_gated_forward, gate, up, (gate, up, out), ctx.activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (
            torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (gate, up)
        )
        tensors = (grad.contiguous(), gate, up, grad_gate, grad_up)
        _launch(_gated_backward, gate, up, tensors, ctx.activation)
        return grad_gate, grad_up, None


def _launch(kernel, gate: Tensor, up: Tensor, tensors: tuple[Tensor, ...], activation: int):
    width = gate.shape[-1]
    if gate.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        grid = (gate.numel() // width, triton.cdiv(width, block))
        with torch.cuda.device_of(gate):
            kernel[grid](
                *tensors,
                gate.stride(-2),
                up.stride(-2),
                width,
                ACTIVATION=activation,
                BLOCK=block,
                num_warps=max(1, block // 512),
            )


def _rows_apart(x: Tensor) -> Tensor:
    """``x`` if its rows are equally spaced and each row is contiguous, else a contiguous copy."""
    shape, strides = x.shape, x.stride()
    spaced = strides[-1] == 1 and all(
        shape[i] == 1 or strides[i] == strides[i + 1] * shape[i + 1] for i in range(x.dim() - 2)
    )
    return x if spaced else x.contiguous()


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``.

    Args:
        gate: Output of the gate projection, ``[..., I]``, any float dtype; halves of a fused
            projection need no copy.
        up: Output of the up projection, ``[..., I]``.
        activation: Name of the activation, one of `ACTIVATIONS`.

    Returns:
        Product, ``[..., I]`` in the dtype of ``gate``.
    """
    if not use_triton(gate):
        return gated_activation_reference(gate, up, activation)
    return _GatedActivation.apply(_rows_apart(gate), _rows_apart(up), activation)
