"""Losses of one segment of logits, and their gradient, which overwrites the logits.

There is no fp32 copy: the softmax is fp32 in registers. Memory traffic, in elements: reads 2*S*V,
writes S*V.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo_hf.kernels.launch import use_triton


def segment_reference(
    raw: Tensor,
    targets: Tensor,
    weights: Tensor,
    divisor: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted losses ``[S]`` of logits ``[S, V]`` as the head returns them, and their gradient."""
    wide = torch.promote_types(raw.dtype, torch.float32)
    logits = raw.detach().to(wide, copy=True).div_(divisor)
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        logits = capped * softcap
    # Not by logsumexp, which makes a tensor of this size.
    highest = logits.amax(1, keepdim=True)
    at_target = logits.sub_(highest).gather(1, targets[:, None])
    total = logits.exp_().sum(1, keepdim=True)
    losses = (total.log() - at_target).squeeze(1) * weights
    grad = logits.div_(total)
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
    grad.mul_(weights[:, None]).div_(divisor)
    if softcap is not None:
        grad.mul_(1 - capped.square_())
    return losses, grad.to(raw.dtype)


@triton.jit
def _capped(logits, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    logits = logits.to(tl.float32) * scale
    if HAS_SOFTCAP:
        logits = softcap * (2.0 / (1.0 + tl.exp(-2.0 / softcap * logits)) - 1.0)
    return logits


@triton.jit
def _segment_kernel(
    logits_ptr,  # [S, V], overwritten by their gradient if GRADIENT
    targets_ptr,  # [S]
    weights_ptr,  # [S] fp32
    losses_ptr,  # [S] fp32, out
    stride,
    scale,
    softcap,
    vocabulary,
    HAS_SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    weight = tl.load(weights_ptr + row)
    # Read before the first reduction: later on another thread may have overwritten it.
    is_token = (target >= 0) & (target < vocabulary)  # a neighbour's logits are not its loss
    at_target = tl.load(logits_ptr + target, mask=is_token, other=float("nan"))
    at_target = _capped(at_target, scale, softcap, HAS_SOFTCAP)
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lane < vocabulary
        logits = tl.load(logits_ptr + start + lane, mask=inside, other=0.0)
        logits = _capped(logits, scale, softcap, HAS_SOFTCAP)
        logits = tl.where(inside, logits, -float("inf"))
        higher = tl.maximum(highest, logits)
        total = total * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    peak = tl.max(highest, 0)
    log_z = peak + tl.log(tl.sum(total * tl.exp(highest - peak), 0))
    loss = weight * (log_z - at_target)
    tl.store(losses_ptr + row, loss)
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            inside = start + lane < vocabulary
            logits = tl.load(logits_ptr + start + lane, mask=inside, other=0.0)
            logits = _capped(logits, scale, softcap, HAS_SOFTCAP)
            grad = tl.exp(logits - log_z)
            grad -= tl.where(start + lane == target, 1.0, 0.0)
            grad *= weight * scale
            if HAS_SOFTCAP:
                capped = logits / softcap
                grad *= 1.0 - capped * capped
            grad = grad.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + start + lane, grad, mask=inside)


def segment_losses_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    losses: Tensor,
    divisor: float = 1.0,
    softcap: float | None = None,
    gradient: bool = True,
) -> None:
    """Compute weighted losses of one segment; if ``gradient``, their gradient overwrites the
    logits.

    Args:
        logits: Logits as the head returns them, ``[S, V]``, any float dtype.
        targets: Tokens to predict, ``[S]`` int64.
        weights: Factors of the losses, ``[S]`` fp32.
        losses: Tensor that the losses are written to, ``[S]`` fp32, nats.
        divisor: Number that logits are divided by.
        softcap: Soft cap of the logits after that, ``softcap * tanh(logits / softcap)``, or None.
        gradient: Whether the gradient overwrites ``logits``.
    """
    logits = logits.detach()
    if not use_triton(logits):
        rows, grad = segment_reference(logits, targets, weights, divisor, softcap)
        losses.copy_(rows)
        if gradient:
            logits.copy_(grad)
        return
    with torch.cuda.device_of(logits):
        _segment_kernel[(len(targets),)](
            logits,
            targets,
            weights,
            losses,
            logits.stride(0),
            1.0 / divisor,
            softcap,
            logits.shape[1],
            HAS_SOFTCAP=softcap is not None,
            GRADIENT=gradient,
            BLOCK=8192,
            num_warps=16,
        )
