"""Training passes as CUDA graphs: forward and backward of a batch, launched as one.

The host takes as long for a step of 1,000 tokens as for one of 100,000, and below 8,000 (of an 8B
model on an H200) the GPU waits for it. A graph takes it out: what a pass launches is recorded once
and from then on replayed. Shapes in it are fixed, so batches that keep as many rows share a graph,
and any other batch runs as ever.
"""

import gc
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel, masking_utils

from lemo_hf.compiled import stock_call
from lemo_hf.config import LeMoConfig
from lemo_hf.kernels.launch import sharded
from lemo_hf.passes import Passes, runs_own_forward
from lemo_hf.step import RowCounts

logger = logging.getLogger(__name__)

MOST_GRAPHS = 8  # each holds its launches and gradients; memory of activations is shared
REMEMBERED = 64  # batches whose shapes are remembered until they come again


@dataclass(frozen=True)
class _Gradients:
    """Gradients of some parameters, flat, one tensor a dtype.

    Attributes:
        flat: By dtype.
        layout: Dtype and shape of each parameter's.
    """

    flat: dict[torch.dtype, Tensor]
    layout: list[tuple[torch.dtype, torch.Size]]

    @classmethod
    def of(cls, gradients: list[Tensor]) -> "_Gradients":
        parts: dict[torch.dtype, list[Tensor]] = {}
        for x in gradients:
            parts.setdefault(x.dtype, []).append(x.flatten())
        layout = [(x.dtype, x.shape) for x in gradients]
        return cls({dtype: torch.cat(flats) for dtype, flats in parts.items()}, layout)

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Gradients":
        return _Gradients({dtype: function(x) for dtype, x in self.flat.items()}, self.layout)

    def split(self) -> list[Tensor]:
        parts = {}
        for dtype, flat in self.flat.items():
            sizes = [shape.numel() for kind, shape in self.layout if kind == dtype]
            parts[dtype] = iter(flat.split(sizes))
        return [next(parts[dtype]).view(shape) for dtype, shape in self.layout]


@dataclass(frozen=True)
class _Recorded:
    """A pass that was recorded.

    Attributes:
        graph: Its launches.
        inputs: Tensors that it reads, by name.
        global_step: Another, int64 scalar.
        loss: What it writes, fp32 scalar.
        parameters: That ``loss`` depends on.
        gradients: Of ``loss`` by them, also written.
        output: Of the model, with ``loss`` in it.
        counts: Of `Passes`, also written.
        kept_blocks: The same.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    global_step: Tensor
    loss: Tensor
    parameters: list[nn.Parameter]
    gradients: _Gradients
    output: Any
    counts: dict[str, Any]
    kept_blocks: dict[tuple[int, str], Tensor]


class _Replay(Function):
    """The loss of a recorded pass, whose gradients are there as soon as it is."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, *parameters: Tensor) -> Tensor:
        recorded.graph.replay()
        ctx.gradients = recorded.gradients.map(torch.clone)  # the next replay writes over them
        return recorded.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients.map(lambda flat: flat * grad).split()


class CudaGraphs:
    """What a model does in training mode, by CUDA graphs where it can.

    A batch can if it is on one GPU, has labels, no padding and no ``position_ids``, and the model
    makes its own loss; a row's documents, padding and a loss from outside fix no shapes. The first
    batch of a shape runs as ever (kernels compile), the second is recorded, and up to
    `MOST_GRAPHS` shapes are. A graph's memory stays taken until LeMo is taken off.

    Hooks on modules inside the model run while a pass is recorded, not when it is replayed, and
    gradients arrive at all parameters at once.

    Args:
        passes: Of the model.
    """

    def __init__(self, passes: Passes):
        self.passes = passes
        self._graphs: dict[tuple, _Recorded] = {}
        self._seen: deque[tuple] = deque(maxlen=REMEMBERED)
        self._pool: Any = None  # one for all: no two graphs run at a time
        self._weights: list[nn.Parameter] = []
        self._places: list[tuple[int, bool]] = []
        self._said: set[str] = set()

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """As `stock_call`."""
        if args:
            kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        if not torch.is_grad_enabled():
            return stock_call(model, **kwargs)
        why = self._why_not(kwargs)
        if why is not None:
            self._say(why)
            return stock_call(model, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs.pop("attention_mask", None)
        self.passes.rows = rows = self.passes.count_rows(ids, mask, kwargs["labels"])
        try:
            if any(row.tokens < ids.shape[1] for row in rows):
                self._say("its rows have padding")
                return stock_call(model, attention_mask=mask, **kwargs)
            return self._run(model, kwargs, rows)
        finally:
            self.passes.rows = None

    def _run(self, model: PreTrainedModel, kwargs: dict[str, Any], rows: list[RowCounts]) -> Any:
        self._forget_if_weights_moved(model)
        key = _key(kwargs, rows)
        if key not in self._graphs:
            if key not in self._seen:
                self._seen.append(key)
                return stock_call(model, **kwargs)
            why = f"{MOST_GRAPHS} shapes have one" if len(self._graphs) == MOST_GRAPHS else None
            why = why or _why_never(model, self.passes.config)
            if why is not None:
                self._say(why)
                return stock_call(model, **kwargs)
            self._graphs[key] = self._record(model, kwargs)
        return self._replay(self._graphs[key], kwargs)

    def _why_not(self, kwargs: dict[str, Any]) -> str | None:
        """Why a batch cannot run by a graph; None if it may."""
        ids = kwargs.get("input_ids")
        if ids is None or not ids.is_cuda:
            return "it needs input_ids on a GPU"
        if self.passes.promised or not isinstance(kwargs.get("labels"), Tensor):
            return "the model is given no labels"
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            return f"attention_mask has {mask.dim()} dimensions"
        known = {*_INPUTS, "attention_mask", *_PLAIN}
        others = [name for name, value in kwargs.items() if value is not None and name not in known]
        return f"the model is given {', '.join(sorted(others))}" if others else None

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.warning("cuda_graphs: a batch ran without one, since %s. Said once.", why)

    def _forget_if_weights_moved(self, model: PreTrainedModel) -> None:
        """Graphs read and write where weights were."""
        if self._places == [(p.data_ptr(), p.requires_grad) for p in self._weights] != []:
            return
        self._graphs.clear()
        self._seen.clear()
        self._weights = list(model.parameters())
        self._places = [(p.data_ptr(), p.requires_grad) for p in self._weights]

    def _record(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> _Recorded:
        """Run a pass without computing anything, and note down what it launches."""
        passes = self.passes
        device = kwargs["input_ids"].device
        inputs = {
            name: torch.as_tensor(kwargs[name], device=device).clone()
            for name in _INPUTS
            if kwargs.get(name) is not None
        }
        plain = {name: kwargs[name] for name in _PLAIN if name in kwargs}
        counts, global_step = passes.counts, passes.global_step
        passes.reset_counts()
        passes.global_step = torch.zeros((), dtype=torch.int64, device=device)
        trained = [p for p in self._weights if p.requires_grad]
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # what is cast must be cast inside
        gc.collect()
        gc.disable()  # what it frees might call CUDA in between
        # Other threads (pinning batches, NCCL) go on meanwhile.
        recording = torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local")
        try:
            with _same_stream_after(device), _no_documents(), _aliases(model) as alias, recording:
                output = stock_call(model, **inputs, **plain)
                loss = output[0] if isinstance(output, tuple) else output["loss"]
                # By themselves as well, to notice one that is used past the modules that own it.
                aliases = [alias[p] for p in trained]
                found = torch.autograd.grad(loss, [*aliases, *trained], allow_unused=True)
                if any(x is not None for x in found[len(trained) :]):
                    raise RuntimeError("it uses weights past the modules that hold them")
                pairs = [(p, x) for p, x in zip(trained, found, strict=False) if x is not None]
                gradients = _Gradients.of([x for _, x in pairs])
            self._pool = graph.pool()
            return _Recorded(
                graph,
                inputs,
                passes.global_step,
                loss.detach(),
                [p for p, _ in pairs],
                gradients,
                output,
                passes.counts,
                passes.kept_blocks,
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"this model's training pass cannot become a CUDA graph: {_first(error)}\nSet "
                "LeMoConfig(cuda_graphs=False)."
            ) from error
        finally:
            gc.enable()
            torch.clear_autocast_cache()
            passes.counts, passes.global_step = counts, global_step

    def _replay(self, recorded: _Recorded, kwargs: dict[str, Any]) -> Any:
        passes = self.passes
        for name, place in recorded.inputs.items():
            value = kwargs[name]
            place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)
        recorded.global_step.fill_(passes.global_step)
        loss = _Replay.apply(recorded, *recorded.parameters)
        for name, count in recorded.counts.items():
            passes.counts[name] = passes.counts[name] + count
        passes.kept_blocks = recorded.kept_blocks
        output = recorded.output
        if isinstance(output, tuple):
            return loss, *output[1:]
        return type(output)(**{**output, "loss": loss})


_INPUTS = ("input_ids", "labels", "num_items_in_batch")
_PLAIN = ("use_cache", "return_dict")


def _key(kwargs: dict[str, Any], rows: list[RowCounts]) -> tuple:
    """What fixes the shapes and kinds of all that a pass computes."""
    ids = kwargs["input_ids"]
    given = tuple(kwargs.get(name) is not None for name in _INPUTS)
    plain = tuple(kwargs.get(name) for name in _PLAIN)
    low = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return ids.device, ids.shape, tuple(rows), given, plain, low


def _why_never(model: PreTrainedModel, config: LeMoConfig) -> str | None:
    """Why no pass of ``model`` can become a graph."""
    weights = list(model.parameters())
    if any(p.device != weights[0].device for p in weights):
        return "the model is on several devices"
    if sharded(model):
        return "its weights are in parts on several processes"
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
    if half or any(p.dtype == torch.float16 for p in weights):
        return "gradients in float16 need a loss that is scaled before them; take bfloat16"
    if not any(p.requires_grad for p in weights):
        return "no weight is trained"
    if model.config._attn_implementation == "eager":
        return "masks of eager attention come from the host; take attn_implementation='sdpa'"
    if not runs_own_forward(model):
        return "the loss is not the model's own"
    again = model.is_gradient_checkpointing or config.recompute not in (None, "none")
    if again and _draws(model):
        return "dropout must be drawn again where layers are computed again"
    return None


def _draws(model: PreTrainedModel) -> bool:
    """Whether a pass may draw random numbers: dropout."""
    named = any("drop" in name and bool(value) for name, value in model.config.to_dict().items())
    return named or any(isinstance(part, nn.Dropout) and part.p for part in model.modules())


def _first(error: BaseException) -> BaseException:
    """What went wrong; that the graph is broken is noticed later, and raised instead."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@contextmanager
def _same_stream_after(device: torch.device) -> Iterator[None]:
    """Go back to the stream that is current now, which a capture that fails does not."""
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        yield


@contextmanager
def _aliases(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Put parameters of the same memory in place of those that are trained.

    Autograd ties a parameter to the stream of the first pass that used it, for as long as anything
    of that pass lives (a loss from before, DDP). No other stream may wait for a captured one.
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


@contextmanager
def _no_documents() -> Iterator[None]:
    """Tell transformers that a row is one document and no graph is made, so that it asks neither.

    While a stream is captured it would make masks that nobody needs, in place of asking the batch.
    """
    with (
        patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None),
        patch.object(masking_utils, "is_tracing", lambda *_: False),
        patch.object(masking_utils, "fast_all", lambda _: True),  # OPT makes a mask of ones
    ):
        yield
