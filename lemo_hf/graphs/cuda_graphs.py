"""Training passes as CUDA graphs: forward and backward of a batch, launched as one.

The host takes as long for a step of 1,000 tokens as for one of 100,000, and below 8,000 (of an 8B
model on an H200) the GPU waits for it. With a graph it does not: the launches of a pass are
recorded once and then replayed. Shapes in a graph are fixed. Batches that keep equally many rows
share one, also if their answers differ in length (`RowCounts.shapes`). Any other batch runs without
a graph.
"""

import inspect
import logging
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, masking_utils

from lemo_hf.altered import altering
from lemo_hf.batch.facts import BatchFacts
from lemo_hf.batch.row_counts import RowCounts
from lemo_hf.batch.selection import num_kept_blocks
from lemo_hf.batch.tally import Seen
from lemo_hf.config import LeMoConfig
from lemo_hf.core.attention import by_sdpa
from lemo_hf.core.compiled import stock_call
from lemo_hf.core.lazy_logits import Logits, stock_class, with_logits
from lemo_hf.core.loss import shifted
from lemo_hf.core.own_loss import OF_GRAPHS, makes_plain_loss, returns_tuple
from lemo_hf.core.passes import Passes
from lemo_hf.graphs.recorded_pass import RecordedPass, Written, aliases, flatten
from lemo_hf.graphs.watched import Watched
from lemo_hf.kernels.capture import capture
from lemo_hf.kernels.launch import sharded

logger = logging.getLogger(__name__)

DEVICE = "cuda"
MOST_GRAPHS = 8  # each holds its launches and gradients; memory of activations is shared
REMEMBERED = 64  # batches whose shapes are remembered until they come again

_INPUTS = {"input_ids": None, "labels": None, "num_items_in_batch": torch.float32}  # dtypes
_PLAIN = ("use_cache", "return_dict")


class CudaGraphs:
    """Runs a model in training mode, by CUDA graphs if it can.

    A batch can if it is on one GPU, has labels, no padding and no ``position_ids``, and the model
    makes its own loss; otherwise shapes are not fixed. The first batch of a shape runs without a
    graph (kernels compile), and the second is recorded, for at most `MOST_GRAPHS` shapes. A graph
    keeps its memory until `remove_lemo`.

    Hooks on modules run while a pass is recorded, not when it is replayed, and gradients arrive at
    all parameters at once.

    Args:
        model: The model.
        passes: Passes of the model.
    """

    def __init__(self, model: PreTrainedModel, passes: Passes):
        self.passes = passes
        self._model = weakref.ref(model)
        self._graphs: dict[tuple, RecordedPass] = {}
        self._once: deque[tuple] = deque(maxlen=REMEMBERED)
        self._pool: Any = None  # one for all: no two graphs run at a time
        self._watched: Watched | None = None
        self._state: list = []
        self._never: str | None = None
        self._said: set[str] = set()

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Call the model, as `stock_call` does."""
        if args:
            kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        if not torch.is_grad_enabled():
            return stock_call(model, **kwargs)
        why = self._why_not(model, kwargs)
        if why is not None:
            self._say(why)
            return stock_call(model, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs.pop("attention_mask", None)
        self.passes.rows = rows = _count_rows(
            model, self.passes.config, ids, mask, kwargs["labels"]
        )
        try:
            if any(row.tokens < ids.shape[1] for row in rows):
                self._say("its rows have padding")
                return stock_call(model, attention_mask=mask, **kwargs)
            return self._run(model, kwargs, rows)
        finally:
            self.passes.rows = None

    def _run(self, model: PreTrainedModel, kwargs: dict[str, Any], rows: list[RowCounts]) -> Any:
        key = _key(kwargs, [row.shapes(self._least(row)) for row in rows])
        if key not in self._graphs:
            full = len(self._graphs) == MOST_GRAPHS
            if full:
                self._say(f"{MOST_GRAPHS} shapes have one")
            if full or key not in self._once:
                self._once.append(key)
                return stock_call(model, **kwargs)
            self._graphs[key] = self._record(model, kwargs)
        recorded, passes = self._graphs[key], self.passes
        loss = recorded.replay(kwargs, passes.global_step)
        passes.count_replay(recorded.written.seen)
        output = tree_map_only(Tensor, torch.clone, recorded.written.output)
        return with_logits(output, loss, Logits(None, OF_GRAPHS))

    def _least(self, row: RowCounts) -> int:
        """Least number of blocks that a sublayer keeps of the row; 0 if scores decide."""
        config = self.passes.config
        given = (config.retention, config.mlp_retention, self.passes.retention)
        each = [x for value in given for x in (value if isinstance(value, tuple) else (value,))]
        shares = [share for share in each if share is not None]
        scored = config.threshold is not None or config.mlp_threshold is not None
        return 0 if scored else num_kept_blocks(min(shares), row.blocks)

    def _why_not(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
        """Why a batch cannot run by a graph, in words; None if it can."""
        if model is not self._model():
            return "this is a copy of the model that LeMo is on"
        ids = kwargs.get("input_ids")
        if ids is None or ids.device.type != DEVICE:
            return "it needs input_ids on a GPU"
        if self.passes.announced.any() or not makes_plain_loss(model, kwargs):
            return "the loss is not the model's own"
        if returns_tuple(model, kwargs):
            return "return_dict=False asks for logits as well"
        if not isinstance(kwargs.get("labels"), Tensor):
            return "the model is given no labels"
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            return f"attention_mask has {mask.dim()} dimensions"
        known = {*_INPUTS, "attention_mask", *_PLAIN}
        others = [name for name, value in kwargs.items() if value is not None and name not in known]
        if others:
            return f"the model is given {', '.join(sorted(others))}"
        # Known once a pass has run.
        if self.passes.dtype == torch.float16:
            return "gradients in float16 need a loss that is scaled before them; take bfloat16"
        self._notice_changes(model)
        return self._never

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.warning(
                "cuda_graphs: a batch ran without one, since %s. This is said once.", why
            )

    def _notice_changes(self, model: PreTrainedModel) -> None:
        """Drop all graphs if the model changed: they use weights and buffers where they were."""
        fp8 = self.passes.fp8
        phase = self.passes.retention, self.passes.in_fp8, fp8 and fp8.changes
        if self._watched is not None and [*phase, *self._watched.state()] == self._state:
            return
        self._watched = Watched(model)
        self._state = [*phase, *self._watched.state()]
        self._never = _why_never(model, self.passes.config)
        self._graphs.clear()
        self._once.clear()
        self._pool = None  # it is gone with the last of its graphs

    def _record(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> RecordedPass:
        device = kwargs["input_ids"].device
        inputs = {
            name: torch.as_tensor(kwargs[name], dtype=dtype, device=device).clone()
            for name, dtype in _INPUTS.items()
            if kwargs.get(name) is not None
        }
        plain = {name: kwargs[name] for name in _PLAIN if name in kwargs}
        global_step = torch.zeros((), dtype=torch.int64, device=device)

        def run() -> Written:
            with _no_documents(), self._counting_apart(global_step) as seen:
                return _forward_and_backward(model, {**inputs, **plain}, seen)

        try:
            graph, written = capture(run, self._pool, device)
        except RuntimeError as error:
            first = _first(error)
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise RuntimeError(
                f"this model's training pass cannot become a CUDA graph: {first}\nSet "
                "LeMoConfig(cuda_graphs=False)."
            ) from error
        self._pool = graph.pool()
        return RecordedPass(graph, inputs, global_step, written)

    @contextmanager
    def _counting_apart(self, global_step: Tensor) -> Iterator[list[Seen]]:
        """Within this context counts of a pass go into the list, and its step is
        ``global_step``."""
        passes, seen = self.passes, list[Seen]()
        before, passes.global_step, passes.deliver = passes.global_step, global_step, seen.append
        try:
            yield seen
        finally:
            passes.global_step, passes.deliver = before, passes.tally.add


def _count_rows(
    model: PreTrainedModel, config: LeMoConfig, ids: Tensor, mask: Tensor | None, labels: Tensor
) -> list[RowCounts]:
    """Counts of a batch before its pass; the host waits for them."""
    targets = shifted(labels)
    facts = BatchFacts(
        config.block_size,
        (ids.shape[0], ids.shape[1]),
        ids.device,
        attention_mask=mask,
        targets=targets,
        vocabulary=model.config.get_text_config().vocab_size,
    )
    facts.check_labels(targets)
    return facts.rows


def _forward_and_backward(
    model: PreTrainedModel, inputs: dict[str, Any], seen: list[Seen]
) -> Written:
    trained = [p for p in model.parameters() if p.requires_grad]
    with aliases(model) as alias:
        output = stock_call(model, **inputs)
        loss = output["loss"]
        # By themselves as well, to notice one that is used past the modules that own it.
        weights = [*(alias[p] for p in trained), *trained]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
    if any(x is not None for x in found[len(trained) :]):
        raise RuntimeError("it uses weights without calling the modules that hold them")
    pairs = [(p, x) for p, x in zip(trained, found, strict=False) if x is not None]
    kept = {name: x for name, x in output.items() if name not in ("loss", "logits")}
    rest = stock_class(output)(**kept)
    return Written(
        loss.detach(),
        [p for p, _ in pairs],
        *flatten([x for _, x in pairs]),
        tree_map_only(Tensor, Tensor.detach, rest),
        seen[0],
    )


def _key(kwargs: dict[str, Any], rows: list[tuple]) -> tuple:
    """Key of everything that decides the shapes and kinds of a pass's tensors."""
    ids = kwargs["input_ids"]
    given = tuple(kwargs.get(name) is not None for name in _INPUTS)
    plain = tuple(kwargs.get(name) for name in _PLAIN)
    low = torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE)
    return ids.device, ids.shape, tuple(rows), given, plain, low


def _why_never(model: PreTrainedModel, config: LeMoConfig) -> str | None:
    """Why no pass of ``model`` can become a graph."""
    weights = list(model.parameters())
    if any(p.device != weights[0].device for p in weights):
        return "the model is on several devices"
    if sharded(model):
        return "its weights are split over several processes"
    if not any(p.requires_grad for p in weights):
        return "no weight is trained"
    if getattr(model.config, "output_router_logits", False):
        return "the auxiliary loss of experts is made outside the graph"
    attention = model.config.get_text_config()._attn_implementation
    if not by_sdpa(attention):
        return f"{attention} attention asks the host; take attn_implementation='sdpa'"
    if any("dynamic" in kind or kind == "longrope" for kind in _rope_types(model)):
        return "the host picks the frequencies of its rotary embedding by length"
    if getattr(model, "is_loaded_in_8bit", False):
        return "bitsandbytes asks the host about outliers of 8-bit weights"
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "module_dropout", 0) for adapter in adapters):
        return "the host draws which of PEFT's modules are dropped"
    checkpoints = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    again = checkpoints or config.recompute not in (None, "none")
    if again and _draws(model):
        return "dropout must be drawn again where layers are computed again"
    return None


def _rope_types(model: nn.Module) -> Iterator[str]:
    """Kinds of rotary embeddings; a model may have one for each kind of layer."""
    for part in model.modules():
        kind = getattr(part, "rope_type", None)
        yield from kind.values() if isinstance(kind, dict) else [kind or "default"]


def _draws(model: PreTrainedModel) -> bool:
    """Whether a pass may draw random numbers: dropout, a router's jitter."""
    named = any(
        ("drop" in name or "jitter" in name) and bool(value)
        for name, value in model.config.get_text_config().to_dict().items()
    )
    layers = (part for part in model.modules() if "Dropout" in type(part).__name__)
    return named or any(getattr(part, "p", 1) for part in layers)


def _first(error: BaseException) -> BaseException:
    """The first error, since a later one, that the graph is broken, is raised instead."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _no_documents() -> AbstractContextManager[None]:
    """Within this context transformers takes a row for one document and no graph for under way, so
    that it does not ask.

    While a CUDA stream is captured it would make masks that nobody needs, instead of asking the
    batch.
    """
    return altering(
        masking_utils,
        find_packed_sequence_indices=lambda *_, **__: None,
        is_tracing=lambda *_: False,
        fast_all=lambda _: True,  # OPT makes a mask of ones
    )
