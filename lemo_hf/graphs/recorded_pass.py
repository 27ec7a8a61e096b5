"""A training pass as one CUDA graph, forward and backward, and its place in autograd."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.batch.tally import Seen


@dataclass(frozen=True)
class Written:
    """Tensors that a recorded pass writes anew at every replay.

    Attributes:
        loss: Loss, fp32 scalar.
        parameters: Parameters that the loss depends on.
        gradients: Gradients of the loss by these, flat, one tensor a dtype.
        layout: Tensor that holds each parameter's gradient, and the gradient's shape.
        output: Output of the model, without the loss.
        seen: Counts of what the pass kept.
    """

    loss: Tensor
    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    layout: list[tuple[int, torch.Size]]
    output: Any
    seen: Seen


@dataclass(frozen=True)
class RecordedPass:
    """A pass that can be replayed.

    Attributes:
        graph: CUDA graph with its launches.
        inputs: Input tensors, by name.
        global_step: Number of the step, which it also reads, int64 scalar tensor.
        written: Tensors that it writes.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    global_step: Tensor
    written: Written

    def replay(self, given: dict[str, Any], global_step: Tensor | int) -> Tensor:
        """Replay the pass on the inputs ``given``. Returns the loss, whose backward gives the
        gradients."""
        for name, place in self.inputs.items():
            value = given[name]
            place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)
        self.global_step.fill_(global_step)
        return _Replay.apply(self.graph, self.written, *self.written.parameters)


class _Replay(Function):
    """The loss of a recorded pass, whose gradients exist as soon as the loss does."""

    @staticmethod
    def forward(
        ctx: Any, graph: torch.cuda.CUDAGraph, written: Written, *parameters: Tensor
    ) -> Tensor:
        graph.replay()
        # The next replay writes over them.
        ctx.save_for_backward(*(flat.clone() for flat in written.gradients))
        ctx.layout = written.layout
        return written.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flats = [flat * grad for flat in ctx.saved_tensors]
        return None, None, *split(flats, ctx.layout)


def flatten(gradients: list[Tensor]) -> tuple[list[Tensor], list[tuple[int, torch.Size]]]:
    """Tensors joined into one for each dtype, and the place of each."""
    dtypes = list(dict.fromkeys(x.dtype for x in gradients))
    flats = [torch.cat([x.flatten() for x in gradients if x.dtype == dtype]) for dtype in dtypes]
    return flats, [(dtypes.index(x.dtype), x.shape) for x in gradients]


def split(flats: list[Tensor], layout: list[tuple[int, torch.Size]]) -> list[Tensor]:
    """The tensors that `flatten` joined."""
    parts = [
        iter(flat.split([shape.numel() for place, shape in layout if place == number]))
        for number, flat in enumerate(flats)
    ]
    return [next(parts[place]).view(shape) for place, shape in layout]


@contextmanager
def aliases(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Within this context parameters in the same memory replace those that are trained.

    Autograd ties a parameter to the CUDA stream of the first pass that used it, as long as anything
    of that pass lives (an earlier loss, DDP). No other CUDA stream may wait for a captured one.
    `torch.func.functional_call` would restore the parameters before the backward runs layers again.
    """
    alias = {p: nn.Parameter(p.detach()) for p in model.parameters() if p.requires_grad}
    places = [
        (part._parameters, name, weight)
        for part in model.modules()
        for name, weight in part._parameters.items()
        if weight is not None and weight.requires_grad
    ]
    try:
        for parameters, name, weight in places:
            parameters[name] = alias[weight]
        yield alias
    finally:
        for parameters, name, weight in places:
            parameters[name] = weight
