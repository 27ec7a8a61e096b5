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
    """What a recorded pass writes, anew at every replay.

    Attributes:
        loss: fp32 scalar.
        parameters: That it depends on.
        gradients: Of the loss by them, flat, one tensor a dtype.
        layout: Of each parameter's gradient: which of these it lies in, and its shape.
        output: Of the model, without the loss.
        seen: What the pass kept.
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
        graph: Its launches.
        inputs: Tensors that it reads, by name.
        global_step: Another, int64 scalar.
        written: What it writes.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    global_step: Tensor
    written: Written

    def replay(self, given: dict[str, Any], global_step: Tensor | int) -> Tensor:
        """The loss of inputs ``given``, and in its backward its gradients."""
        for name, place in self.inputs.items():
            value = given[name]
            place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)
        self.global_step.fill_(global_step)
        return _Replay.apply(self.graph, self.written, *self.written.parameters)


class _Replay(Function):
    """The loss of a recorded pass, whose gradients are there as soon as it is."""

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
    """Tensors of any dtype as one a dtype, and where each lies."""
    dtypes = list(dict.fromkeys(x.dtype for x in gradients))
    flats = [torch.cat([x.flatten() for x in gradients if x.dtype == dtype]) for dtype in dtypes]
    return flats, [(dtypes.index(x.dtype), x.shape) for x in gradients]


def split(flats: list[Tensor], layout: list[tuple[int, torch.Size]]) -> list[Tensor]:
    """What `flatten` was given."""
    parts = [
        iter(flat.split([shape.numel() for place, shape in layout if place == number]))
        for number, flat in enumerate(flats)
    ]
    return [next(parts[place]).view(shape) for place, shape in layout]


@contextmanager
def aliases(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Put parameters of the same memory in place of those that are trained.

    Autograd ties a parameter to the CUDA stream of the first pass that used it, for as long as
    anything of that pass lives (a loss from before, DDP). No other may wait for a captured one.
    `torch.func.functional_call` would put them back before the backward runs layers again.
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
