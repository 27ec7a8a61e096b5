"""Cross-entropy of a language-model head, one segment of tokens after the other.

Logits, loss and gradient of a segment exist together and are freed before the next segment begins,
so the peak is ``[segment_size, V]`` and no ``[T, V]`` tensor is ever made. Tokens without a label
do not reach the head, unless they are so few that leaving them out costs more. The gradient is
computed in the forward, while the logits exist, and overwrites them (`segment_losses_`).

Source: LeMo, arXiv:2501.09767, "segment-based peak cutting".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.kernels import launch
from lemo_hf.kernels.launch import sharded, untouched, use_triton
from lemo_hf.kernels.norm import (
    Norm,
    launch_backward,
    launch_forward,
    norm_dtype,
    norm_reference,
)
from lemo_hf.kernels.segment_losses import segment_losses_

IGNORE_INDEX = -100
UNNOTICED = 2**25  # elements of a segment; 64 MiB in 16 bits
WHOLE = 0.98  # share of rows with a label from which on all rows go through the head


def plain_weight(
    head: Callable[[Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    parameters: Sequence[Tensor],
) -> Tensor | None:
    """The weight of a head that is ``hidden @ weight.T`` and nothing else; else None.

    ``device`` and ``dtype`` are those of the head's input. The gradients need no autograd: the
    product itself adds up the gradient of a 16-bit weight in fp32.
    """
    if type(head) is not nn.Linear or head.bias is not None or not untouched(head):
        return None
    if type(head.weight) not in launch.PLAIN:
        return None
    autocast = torch.is_autocast_enabled(device.type)
    low = torch.get_autocast_dtype(device.type) if autocast else dtype
    if not head.weight.dtype == dtype == low:
        return None
    if parameters and (autocast or device.type not in launch.WIDENING or dtype.itemsize != 2):
        return None
    return head.weight


def choose_segment_size(hidden: Tensor, vocabulary: int | None, trained: bool) -> int:
    """Number of rows of a segment, so that it takes a tenth of the memory that exists anyway.

    This memory is hidden ``[N, H]``, its gradient and the head's weight; a segment has logits, rows
    and their gradient. A segment has at least `UNNOTICED` elements, so that the host keeps up with
    small models, and 512 rows, below which matrix products slow down. A trained head also has an
    fp32 gradient, read and written once a segment: then at least H / 2 rows.
    """
    num_rows, width = hidden.shape
    rows = 0
    if vocabulary is not None:
        anyway = 2 * num_rows * width + vocabulary * width
        rows = max(anyway // 10, UNNOTICED) // (vocabulary + 2 * width) // 64 * 64
    return max(512, rows, width // 2 if trained else 0)


def _starts(count: int, size: int) -> Sequence[int]:
    """Indices at which segments begin."""
    return range(0, count, size)


class _SegmentCrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden, targets, weights, head, norm, how, options, *parameters):
        needs_grad = any(ctx.needs_input_grad)
        of_hidden = ctx.needs_input_grad[0]
        grad_hidden = torch.zeros_like(hidden) if of_hidden else None
        grad_parameters = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        of_norm = trained_parameters(norm)
        of_head = parameters[: len(parameters) - len(of_norm)]
        dtype = hidden.dtype if norm is None else norm_dtype(hidden, norm)
        weight = plain_weight(head, hidden.device, dtype, of_head)
        if isinstance(head, nn.Module) and sharded(head):
            # Hooks would gather it once a segment, and processes differ in how many they have.
            head = head.forward
        targets, weights, labelled = _labelled(targets, weights, how.most_labels)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in _starts(len(targets), how.segment_size):
            part = slice(start, start + how.segment_size)
            index = None if labelled is None else labelled[part]
            source = hidden[part] if index is None else hidden
            rows, normed = read_rows(source.detach(), index, norm)
            by_autograd = needs_grad and weight is None
            with torch.set_grad_enabled(by_autograd):
                normed.requires_grad_(by_autograd and (of_hidden or bool(of_norm)))
                made = head(normed)
            # A hook on the head's backward hands out a view, which may not be overwritten.
            logits = made.detach().clone() if by_autograd and made._is_view() else made
            segment_losses_(
                logits, targets[part], weights[part], losses[part], **options, gradient=needs_grad
            )
            if not needs_grad:
                continue
            if by_autograd:
                wanted = ([normed] if normed.requires_grad else []) + list(of_head)
                grads = list(torch.autograd.grad(made, wanted, logits.detach(), allow_unused=True))
                grad_normed = grads.pop(0) if normed.requires_grad else None
                for total, partial in zip(grad_parameters, grads, strict=False):
                    if partial is not None:
                        total += partial
                del grads
            else:
                grad_normed = logits @ weight if of_hidden or of_norm else None
                for total, _ in zip(grad_parameters, of_head, strict=False):
                    torch.addmm(total, logits.T, normed, out_dtype=total.dtype, out=total)
            del made, logits  # or they would stay until the next segment's exist
            if grad_normed is None:
                continue
            if grad_hidden is None:
                out = torch.empty_like(rows)
            else:
                out = grad_hidden[part] if index is None else grad_hidden
            place = index if of_hidden else None
            found = write_gradient(out, place, rows, grad_normed, norm)
            for total, partial in zip(grad_parameters[len(of_head) :], found, strict=True):
                total += partial
        ctx.grad_hidden = grad_hidden
        ctx.grad_parameters = [
            total.to(p.dtype) for total, p in zip(grad_parameters, parameters, strict=True)
        ]
        return losses.sum()

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
        return grad_hidden, *[None] * 6, *grad_parameters


class _How(NamedTuple):
    segment_size: int
    most_labels: int | None


def _labelled(
    targets: Tensor, weights: Tensor, most_labels: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Targets and weights of the rows that go through the head, and their places (None: all rows).

    Among them, rows without a label get the weight 0.
    """
    has_label = targets != IGNORE_INDEX
    if most_labels is None:
        labelled = has_label.nonzero().squeeze(1)  # the host waits for their number
    else:
        order = has_label.byte().sort(descending=True, stable=True).indices
        labelled = order[:most_labels]
    weights = weights * has_label
    targets = targets.masked_fill(~has_label, 0)
    if len(labelled) >= WHOLE * len(targets):  # not worth moving rows for
        return targets, weights, None
    return targets[labelled], weights[labelled], labelled


def trained_parameters(norm: Norm | None) -> list[Tensor]:
    """The weight and the bias of the norm that need a gradient."""
    return [] if norm is None else [p for p in norm[1:3] if p is not None and p.requires_grad]


def read_rows(x: Tensor, index: Tensor | None, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Rows ``[S, H]`` of ``x [N, H]`` at ``index [S]`` (None: all), and their norm."""
    if norm is None or not use_triton(x):
        rows = x if index is None else x.index_select(0, index)
        return rows, (rows.detach() if norm is None else norm_reference(rows, norm))
    index = None if index is None else index[None]
    found, normed = launch_forward(x[None], index, norm, write_rows=index is not None)
    assert normed is not None  # there is a norm
    return (x if found is None else found[0]), normed[0]


def write_gradient(
    out: Tensor, index: Tensor | None, rows: Tensor, grad: Tensor, norm: Norm | None
) -> list[Tensor]:
    """Write the gradient of ``rows``, from ``grad [S, H]`` of their norm, to ``out`` at ``index``.

    Returns:
        Gradients of the norm's trained parameters, in fp32 or their own dtype.
    """
    trained = [] if norm is None else [p is not None and p.requires_grad for p in norm[1:3]]
    if norm is not None and use_triton(rows):
        index = None if index is None else index[None]
        grad = grad.to(norm_dtype(rows, norm)).contiguous()[None]
        made = launch_backward(None, grad, rows[None], norm, out[None], index, None, *trained)
        return [x for x in made if x is not None]
    found: list[Tensor] = []
    if norm is not None:
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            wanted = [rows, *trained_parameters(norm)]
            grad, *found = torch.autograd.grad(norm_reference(rows, norm), wanted, grad)
    if index is None:
        out.copy_(grad)
    else:
        out[index] = grad.to(out.dtype)
    return found


def segment_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    segment_size: int | None = None,
    divisor: float = 1.0,
    softcap: float | None = None,
    parameters: Sequence[Tensor] = (),
    norm: Norm | None = None,
    most_labels: int | None = None,
) -> Tensor:
    """Weighted sum of the next-token losses of ``hidden`` under ``head``.

    Args:
        hidden: Input of the head, ``[N, H]``, any float dtype; before ``norm`` if there is one.
        targets: Token to predict from each row, ``[N]`` int64, `IGNORE_INDEX` for none. A number
            that is not a token of the head is an error on the CPU, and gives a loss of NaN in the
            kernel.
        weights: Factor of each row's loss, ``[N]`` fp32.
        head: Module from ``[S, H]`` to logits ``[S, V]``; adapters and quantised weights work,
            since only its call is used. A sharded head must be gathered for the time of this call:
            its forward is called without the hooks that gather it.
        segment_size: Number of rows whose logits exist at one time; None: `choose_segment_size`.
        divisor: Number that logits are divided by (Granite).
        softcap: Soft cap of the logits after that, ``softcap * tanh(logits / softcap)`` (Gemma 2),
            or None.
        parameters: Parameters of the head that need a gradient.
        norm: Norm between ``hidden`` and ``head``, applied a segment at a time; or None.
        most_labels: Upper bound of the number of rows with a label. None: the host waits until they
            are counted.

    Returns:
        Sum over labelled rows of ``weight * nll``, nats, fp32 scalar; the softmax is fp32. Zero,
        still differentiable, if no row has a label. Supports one backward.
    """
    if segment_size is None:
        vocabulary = getattr(head, "out_features", None)  # Linear, its adapted and quantised kin
        segment_size = choose_segment_size(hidden, vocabulary, bool(parameters))
    options = {"divisor": divisor, "softcap": softcap}
    of_norm = trained_parameters(norm)
    how = _How(segment_size, most_labels)
    return _SegmentCrossEntropy.apply(
        hidden, targets, weights, head, norm, how, options, *parameters, *of_norm
    )
