"""Bytes that one decoder layer keeps for its backward, and holds while that runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lemo_hf.planning.model import ATTENTION_INPUTS, MLP_INPUTS, ModelShapes

FP32 = INT32 = 4
FP16 = 2
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What the stock RMSNorm's backward holds beside the fp32 rows it saved, in fp32 rows: gradients of
# the product and of the mean, and three of the square (its base, twice that, the result).
NORM_BACKWARD = 5


@dataclass(frozen=True)
class Trained:
    """What is trained, in which precision.

    Attributes:
        rank: Of LoRA; None: all parameters are trained.
        targets: Names of the adapted linears.
        weight: Bytes of an element of weights and activations.
        adapter: Bytes of an adapter's element.
        copy: Bytes an element of the copy that an adapter keeps of its input; 0: it shares it.
        through: Bytes of an element inside an adapter.
        autocast: Whether autocast is on.
        attention: Bytes of an element of queries, keys, values and what attention makes of them.
        bits: Of a quantised weight, whose linear PEFT's own modules call; None: not quantised.
    """

    rank: int | None
    targets: frozenset[str]
    weight: int
    adapter: int
    copy: int
    through: int
    autocast: bool
    attention: int
    bits: int | None = None

    @classmethod
    def of(
        cls,
        model: ModelShapes,
        rank: int | None,
        targets: Sequence[str] | str | None,
        dtype: str,
        adapter_dtype: str,
        autocast: bool,
        bits: int | None = None,
        upcast: bool = False,
    ) -> "Trained":
        """From the arguments of `plan`.

        Raises:
            ValueError: An adapter is asked for where a layer has no linear.
        """
        weight, adapter = BYTES[dtype], BYTES[adapter_dtype]
        if rank is None:
            return cls(None, frozenset(), weight, weight, 0, weight, autocast, weight)
        targets = model.attention if targets is None else targets
        names = [targets] if isinstance(targets, str) else list(targets)
        names = list(model.linears) if names == ["all-linear"] else names
        if not names or not set(names) <= set(model.linears):
            raise ValueError(
                f"lora_targets={targets!r}: the linears of a layer are {', '.join(model.linears)} "
                "(or 'all-linear'); adapters elsewhere are not predicted."
            )
        through = weight if autocast else adapter
        copy = 0 if adapter_dtype == dtype else through
        attention = weight
        if bits is not None:
            # fp32 embeddings and norms make the stream and all linears' results fp32; autocast
            # casts what attention and adapters read.
            weight = FP32 if upcast else weight
            attention = BYTES[dtype] if autocast else weight
            copy = 0 if through == weight else through
        return cls(
            rank, frozenset(names), weight, adapter, copy, through, autocast, attention, bits
        )

    @property
    def behind_attention(self) -> "Trained":
        """As it is where the input is attention's output."""
        if self.attention == self.weight:
            return self
        return replace(self, weight=self.attention, copy=0)

    @property
    def full(self) -> bool:
        """All parameters are trained."""
        return self.rank is None

    def reaches(self, names: Sequence[str]) -> bool:
        """Whether one of these linears is trained or adapted."""
        return self.full or not self.targets.isdisjoint(names)

    def shares(self, names: Sequence[str]) -> bool:
        """Whether one of these linears saves its input itself, not a copy; LLM.int8's all do."""
        return self.bits == 8 or (self.reaches(names) and not self.copy)

    def inputs(self, names: Sequence[str], width: int, saved: bool = False) -> int:
        """Bytes a row that linears save of the input ``[..., width]`` they share.

        ``saved`` says that somebody else has saved that input already.
        """
        adapted = sum(name in self.targets for name in names)
        own = adapted * (self.copy * width + (self.rank or 0) * self.through)
        return own + (self.weight * width if self.shares(names) and not saved else 0)

    def adapters(self, model: ModelShapes, names: Sequence[str] | None = None) -> int:
        """Elements of the adapters of one layer, or of those of its linears ``names``."""
        wanted = self.targets if names is None else self.targets.intersection(names)
        linears = [model.linears[name] for name in wanted]
        return sum((self.rank or 0) * (linear.width + linear.out) for linear in linears)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer, by part.

    Attributes:
        saved: Kept from its forward to its backward.
        forward: Held by its forward beside that.
        backward: By phase: all that is alive of it.
        may_leave: What of ``saved`` host memory can take: part and bytes of each tensor, in order.
        mlp_gradients: Of what the MLP trains, by the time of its gate.
    """

    saved: dict[str, int]
    forward: int
    backward: dict[str, dict[str, int]]
    may_leave: tuple[tuple[str, int], ...] = ()
    mlp_gradients: int = 0


def stock_norm(model: ModelShapes, trained: Trained) -> int:
    """Bytes a row that transformers' RMSNorm saves: fp32 rows, their factor, perhaps the result."""
    if not trained.full:
        return FP32 * (model.hidden + 1)
    # OLMo 2 multiplies by the weight before it rounds.
    return FP32 * (model.hidden + 1) + model.hidden * (
        FP32 if model.norms_behind else trained.weight
    )


def stock_layer(
    model: ModelShapes, trained: Trained, rows: int, checkpointed: bool, frozen: bool
) -> LayerBytes:
    """Bytes of transformers' own layer; ``frozen``: nothing before it needs a gradient."""
    size, hidden, inner = trained.weight, model.hidden, model.intermediate
    norm = stock_norm(model, trained)
    attention = attention_saved(model, trained, norm, frozen, kept=False)
    active = trained.inputs(("down_proj",), inner)
    above = norm
    if frozen and not trained.reaches((*ATTENTION_INPUTS, "o_proj")):
        above = norm if model.norms_behind else 0  # no gradient goes further than the MLP
    # Gate, up and the activated gate.
    inside = trained.inputs(model.named(MLP_INPUTS), hidden) + 3 * inner * size + active
    mlp = above + inside
    # By the time of the gate, the MLP's output projection and a norm behind it are done.
    held = max(
        3 * inner * size - active - (norm if model.norms_behind else 0),
        adapter_backward(trained, inner, active),
    )
    kept = {"inputs of 8-bit linears": rows * int8_inputs(model, trained, mlp=True)}
    if checkpointed:
        again = _mlp_forward(model, trained, active, again=True)
        held = max(held, again + _adapter_gradients(model, trained))
    # By phase: held beside what was saved, and what of the MLP's has been freed.
    phases = {
        "backward of an MLP": (held, 0),
        "backward of an attention": (attention_backward(model, trained), mlp),
    }
    if not model.norms_behind:
        phases["backward of a norm"] = (NORM_BACKWARD * FP32 * hidden, inside)
    checkpoint = {"stored rows": rows * hidden * size}
    stored = checkpoint | kept
    backward = {}
    for phase, (held, freed) in phases.items():
        parts = {"attention rows": rows * attention, "MLP rows": rows * (mlp - freed)}
        if checkpointed:
            parts = stored | {"recomputed layer": sum(parts.values())}
        backward[phase] = parts | {"backward": rows * held}
    return LayerBytes(
        saved=stored
        if checkpointed
        else {"attention rows": rows * attention, "MLP rows": rows * mlp},
        forward=rows * _mlp_forward(model, trained, active, again=False),
        backward=backward,
        may_leave=tuple(checkpoint.items()) if checkpointed else (),
        mlp_gradients=gradient_bytes(model, trained, ("down_proj",)),
    )


def attention_saved(
    model: ModelShapes, trained: Trained, norm: int, frozen: bool, kept: bool
) -> int:
    """Bytes a row that attention saves, and a norm that saves ``norm``; ``kept``: LeMo's way."""
    reads, size = model.named(ATTENTION_INPUTS), trained.attention
    output = trained.behind_attention
    fused = "qkv_proj" in model.linears
    if frozen and not trained.reaches(reads):
        saved = output.inputs(("o_proj",), model.query)
        return saved + (norm if model.norms_behind else 0)
    rotated = model.query + model.key_value
    saved = (rotated + model.key_value) * size + attention_output(model, trained)
    if fused and size == trained.weight:  # its values are a view that holds the whole projection
        saved += rotated * size
    if model.query_norm:
        groups = rotated // model.head if model.query_norm == "head" else 2
        saved += FP32 * (rotated + groups)
        if trained.full:
            saved += rotated * (FP32 if model.norms_behind else size)
    # The stock rotary of part of a head leaves a layout whose attention output must be copied.
    copied = fused and not kept
    saved += output.inputs(("o_proj",), model.query, saved=not copied)
    saved += trained.inputs(reads, model.hidden)
    return saved + (0 if frozen and not model.norms_behind else norm)


def attention_output(model: ModelShapes, trained: Trained) -> int:
    """Bytes a row of attention's output, and of the logarithm of the softmax's sum."""
    return model.query * trained.attention + FP32 * (model.query // model.head)


def attention_backward(model: ModelShapes, trained: Trained) -> int:
    """Bytes a row that attention's backward holds.

    Gradients of output, queries, keys and values (by query head first, where heads share keys),
    and the fp32 sum of the queries'.
    """
    grouped = model.key_value < model.query
    heads = (2 + 2 * grouped) * model.query + 2 * model.key_value
    return heads * trained.attention + FP32 * model.query


def int8_inputs(model: ModelShapes, trained: Trained, mlp: bool) -> int:
    """Bytes a row of inputs that LLM.int8's linears hold past any checkpoint.

    bitsandbytes keeps them as attributes, which no checkpoint sees. ``mlp``: the MLP's as well.
    """
    if trained.bits != 8:
        return 0
    width = model.hidden + (model.hidden + model.intermediate if mlp else 0)
    return width * trained.weight + model.query * trained.attention


def int8_forward(model: ModelShapes, trained: Trained) -> int:
    """Bytes a row that the MLP's input projections hold in the last one, by LLM.int8.

    Earlier results, and of this one the int32 product, that in fp16, and the result.
    """
    if trained.bits != 8:
        return 0
    *earlier, last = [model.linears[name].out for name in model.named(MLP_INPUTS)]
    return trained.weight * sum(earlier) + (INT32 + FP16 + trained.weight) * last


def gradient_bytes(model: ModelShapes, trained: Trained, names: Sequence[str]) -> int:
    """Bytes of the gradients of the linears ``names`` of one layer, or of their adapters."""
    if trained.full:
        return sum(model.linears[name].parameters for name in names) * trained.weight
    return trained.adapters(model, names) * trained.adapter


def _mlp_forward(model: ModelShapes, trained: Trained, active: int, again: bool) -> int:
    """Bytes a row that an MLP's forward holds beside what it saves.

    If it runs ``again``, for the backward, it stops where the last tensor has been saved.
    """
    hidden, inner, size = model.hidden, model.intermediate, trained.weight
    # In the last input projection: an adapter's output, and that scaled.
    scaled = not trained.full and trained.reaches(MLP_INPUTS)
    entering = 2 * trained.through * inner - active if scaled else 0
    entering = max(entering, int8_forward(model, trained) - 3 * inner * size - active)
    # In the output projection: what the MLP read, that projection's input and output, the fp32 copy
    # that autocast casts once more, the adapter's output, and that scaled.
    leaving = size * hidden
    leaving += 0 if trained.shares(MLP_INPUTS) else size * hidden
    leaving += 0 if trained.shares(("down_proj",)) else size * inner
    if "down_proj" in trained.targets:
        leaving += 0 if again else 2 * trained.through * hidden
        leaving += trained.adapter * inner if trained.copy and trained.autocast else 0
    return max(entering, leaving)


def _adapter_gradients(model: ModelShapes, trained: Trained) -> int:
    """Bytes a row of gradients at the output of the MLP's adapter, when its forward runs again."""
    if "down_proj" not in trained.targets:
        return 0
    widened = trained.copy and not trained.autocast
    return model.hidden * (trained.through + (trained.weight if widened else 0))


def adapter_backward(trained: Trained, inner: int, active: int) -> int:
    """Bytes a row while the gradient of the gate's output comes through the adapter and beside."""
    if "down_proj" not in trained.targets:
        return 0
    widest = 2 * trained.weight  # the adapter's part and the weight's
    if trained.copy:
        widest = trained.adapter + trained.weight
    return max(trained.through * inner, widest * inner - active)
