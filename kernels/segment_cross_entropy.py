"""Cross-entropy of a language-model head, one segment of tokens after the other.

Logits, loss and gradient of a segment exist together and are gone before the next segment begins,
so the vocabulary-sized peak is ``[segment_size, V]`` and no ``[T, V]`` tensor is ever made. Tokens
without a label never reach the head. The gradient is taken in the forward, where the logits are.

Memory, in elements of one segment: V logits in the head's dtype, V in fp32, V gradients in the
head's dtype.

Source: LeMo, arXiv:2501.09767, "segment-based peak cutting".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


def _segment(
    raw: Tensor,  # [S, V] logits as the head returns them
    targets: Tensor,  # [S]
    weights: Tensor,  # [S] fp32
    divisor: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Weighted loss sum of a segment (fp32 scalar) and its gradient ``[S, V]`` to ``raw``."""
    logits = raw.detach().to(torch.float32, copy=True).div_(divisor)
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        logits = capped * softcap
    log_z = logits.logsumexp(1)
    target_logits = logits.gather(1, targets[:, None]).squeeze(1)
    loss = ((log_z - target_logits) * weights).sum()
    grad = logits.sub_(log_z[:, None]).exp_()
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
    grad.mul_(weights[:, None]).div_(divisor)
    if softcap is not None:
        grad.mul_(1 - capped.square_())
    return loss, grad.to(raw.dtype)


class _SegmentCrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden, targets, weights, head, segment_size, divisor, softcap, *parameters):
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_parameters = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        loss = torch.zeros((), device=hidden.device)
        labelled = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        for index in labelled.split(segment_size):
            rows = hidden.detach().index_select(0, index)
            with torch.set_grad_enabled(needs_grad):
                rows.requires_grad_(grad_hidden is not None)
                raw = head(rows)
            part, grad = _segment(raw, targets[index], weights[index], divisor, softcap)
            loss += part
            if not needs_grad:
                continue
            wanted = ([rows] if grad_hidden is not None else []) + list(parameters)
            grads = list(torch.autograd.grad(raw, wanted, grad, allow_unused=True))
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, index, grads.pop(0).to(hidden.dtype))
            for total, partial in zip(grad_parameters, grads, strict=True):
                if partial is not None:
                    total += partial
        ctx.grad_hidden = grad_hidden
        ctx.grad_parameters = [
            total.to(p.dtype) for total, p in zip(grad_parameters, parameters, strict=True)
        ]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.grad_parameters is None:
            raise RuntimeError("the segment loss keeps its gradient for one backward only")
        grads = [g for g in (ctx.grad_hidden, *ctx.grad_parameters) if g is not None]
        for grad in grads:
            grad.mul_(grad_loss)
        grad_hidden, grad_parameters = ctx.grad_hidden, ctx.grad_parameters
        ctx.grad_hidden = ctx.grad_parameters = None
        return grad_hidden, None, None, None, None, None, None, *grad_parameters


def segment_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    segment_size: int,
    divisor: float = 1.0,
    softcap: float | None = None,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Weighted sum of the next-token losses of ``hidden`` under ``head``.

    Args:
        hidden: What the head reads, ``[N, H]``, any float dtype.
        targets: Token to predict from each row, ``[N]`` int64, `IGNORE_INDEX` where there is none.
        weights: Factor of each row's loss, ``[N]`` fp32.
        head: Maps ``[S, H]`` to logits ``[S, V]``; a module with adapters or quantised weights
            works, since only its call is used.
        segment_size: Rows of logits that exist at a time.
        divisor: Logits are divided by it (Granite).
        softcap: Then ``softcap * tanh(logits / softcap)`` (Gemma 2), or None.
        parameters: The head's parameters that need a gradient.

    Returns:
        Sum over labelled rows of ``weight * nll``, nats, fp32 scalar; the softmax is fp32. Zero,
        still differentiable, if no row has a label. Supports one backward.
    """
    return _SegmentCrossEntropy.apply(
        hidden, targets, weights, head, segment_size, divisor, softcap, *parameters
    )
