"""The memory plan of a training step: its peak, part by part, from a model's config alone.

Nothing is loaded or run. Each number is the size of tensors that the training path allocates, and
the peak is taken over the moments of a step at which most of them can be alive.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lemo_hf.config import KeepRule, LeMoConfig
from lemo_hf.kernels.segment_cross_entropy import choose_segment_size
from lemo_hf.plan_layer import (
    BYTES,
    FP32,
    NORM_BACKWARD,
    LayerBytes,
    Rows,
    Trained,
    layer_bytes,
    stock_norm,
)
from lemo_hf.plan_model import MLP_INPUTS, ModelShapes
from lemo_hf.selection import num_kept_blocks

GIB = 2**30
INT64 = 8
# cuBLAS takes 32 MiB on Hopper (8 on other GPUs) for each thread that calls it: the forward's and
# the backward's. Source: PyTorch's notes, "CUDA semantics", cuBLAS workspaces.
WORKSPACES = 2 * 32 * 2**20


@dataclass(frozen=True)
class Plan:
    """The predicted peak of ``torch.cuda.max_memory_allocated`` in one optimizer step.

    A card needs more: its CUDA context (about half a GiB), and what the allocator holds but cannot
    use (``benchmarks/results``: 2 to 20 % of the peak). Tensors count as large as they are;
    the allocator may add up to 1 MiB to each, since it splits off no less (there: 0.4 % in all).

    Attributes:
        parts: Bytes of each part at the moment of the peak.
        phase: That moment.
        phases: Bytes at the highest moment of each phase.
    """

    parts: dict[str, int]
    phase: str
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes, the sum of the parts."""
        return sum(self.parts.values())

    def fits(self, gib: float) -> bool:
        """Whether the peak is at most ``gib`` GiB."""
        return self.peak <= gib * GIB


def plan(
    model_config: Any,
    lemo_config: LeMoConfig | None,
    tokens: int,
    *,
    batch_size: int = 1,
    lora_rank: int | None = 8,
    lora_targets: Sequence[str] | str = ("q_proj", "k_proj", "v_proj", "o_proj"),
    dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
    autocast: bool = True,
    gradient_checkpointing: bool = False,
) -> Plan:
    """Predict the peak memory of a training step on one GPU.

    It is that of rows without padding and with a label on each token, attention by ``sdpa`` or
    ``flash_attention_2``, LoRA without dropout, and fused AdamW.

    Args:
        model_config: Of a transformers causal LM.
        lemo_config: What LeMo leaves out; None is the stock model.
        tokens: Length of a row.
        batch_size: Rows.
        lora_rank: Rank of PEFT's LoRA; None trains all parameters.
        lora_targets: Names of the adapted linears, or ``"all-linear"``.
        dtype: Of the weights: "bfloat16", "float16" or "float32".
        adapter_dtype: Of the adapters. PEFT makes them fp32 unless it is told
            ``autocast_adapter_dtype=False``; each then keeps a copy of its input, which adapters
            of the weights' dtype share.
        autocast: As ``TrainingArguments(bf16=True)`` sets it: those copies are 16-bit.
        gradient_checkpointing: Of the model.

    Raises:
        ValueError: A value is wrong, or is one whose memory is not predicted.

    Source: the code that runs: transformers' layers, PEFT's ``Linear``, this package's kernels, and
    PyTorch's formulas of their backwards.
    """
    for name, value in (("tokens", tokens), ("batch_size", batch_size), ("lora_rank", lora_rank)):
        if not (name == "lora_rank" and value is None) and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    for name, value in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
        if value not in BYTES:
            raise ValueError(f"{name} must be one of {', '.join(BYTES)}, got {value!r}.")
    if autocast and dtype == "float32":
        raise ValueError(
            "autocast of float32 weights is not predicted: load them in bfloat16, or set "
            "autocast=False."
        )
    model = ModelShapes.of(model_config)
    if model.window is not None and model.window < tokens:
        raise ValueError(
            f"sliding_window={model.window} is shorter than {tokens} tokens: masks of tokens x "
            "tokens are not predicted. Set sliding_window=None, or plan for shorter rows."
        )
    trained = Trained.of(model, lora_rank, lora_targets, dtype, adapter_dtype, autocast)
    step = _Step(model, trained, lemo_config, batch_size, tokens, gradient_checkpointing)
    highest: dict[str, dict[str, int]] = {}
    for phase, parts in step.moments():
        if sum(parts.values()) > sum(highest.get(phase, {}).values()):
            highest[phase] = {name: size for name, size in parts.items() if size}
    phases = {phase: sum(parts.values()) for phase, parts in highest.items()}
    peak = max(phases, key=phases.get)
    return Plan(highest[peak], peak, phases)


def longest(
    model_config: Any,
    lemo_config: LeMoConfig | None,
    memory_gib: float,
    *,
    reserve_gib: float = 0.0,
    **settings: Any,
) -> int:
    """The longest row whose `plan` fits.

    Args:
        model_config: As for `plan`; its ``max_position_embeddings`` is no limit.
        lemo_config: As for `plan`.
        memory_gib: Of the card.
        reserve_gib: What of it the plan must leave free: see `Plan` for what else needs memory.
        **settings: Keyword arguments of `plan`.

    Returns:
        Tokens, a multiple of the block size (of 64 without LeMo), no longer than a sliding window;
        0 if not even one block fits.

    Raises:
        ValueError: The memory is no number, or as for `plan`.
    """
    room = memory_gib - reserve_gib
    if not math.isfinite(room):
        raise ValueError(f"memory_gib={memory_gib} and reserve_gib={reserve_gib} must be finite.")
    size = 64 if lemo_config is None else lemo_config.block_size
    window = ModelShapes.of(model_config).window
    most = math.inf if window is None else window // size

    def fits(blocks: int) -> bool:
        if blocks > most:
            return False
        return plan(model_config, lemo_config, blocks * size, **settings).fits(room)

    low, high = 0, 1  # blocks: low fits, high does not
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * size


@dataclass(frozen=True)
class _Step:
    """One optimizer step, and what is alive in it."""

    model: ModelShapes
    trained: Trained
    lemo: LeMoConfig | None
    batch: int
    tokens: int
    checkpointing: bool

    @property
    def rows(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.tokens

    @cached_property
    def rules(self) -> list[tuple[KeepRule, KeepRule | None] | None]:
        """What each layer keeps; None for one that keeps everything."""
        if self.lemo is None:
            return [None] * self.model.layers
        return self.lemo.layer_rules(self.model.layers)

    def kept(self, rule: KeepRule) -> int:
        """Rows of the batch that a rule keeps; the first and the last block are among them."""
        if rule.threshold is not None:
            raise ValueError(
                f"threshold={rule.threshold} keeps what the data say: plan with the retention that "
                "the logs show (lemo/attention_retention)."
            )
        size = self.lemo.block_size
        blocks = -(-self.tokens // size)
        last = self.tokens - (blocks - 1) * size
        count = max(min(2, blocks), num_kept_blocks(rule.retention, blocks))
        return self.batch * ((count - 1) * size + last)

    @cached_property
    def layers(self) -> list[LayerBytes]:
        """Every layer, the first one first."""
        layers: list[LayerBytes] = []
        made: dict[Rows, LayerBytes] = {}
        for index, rule in enumerate(self.rules):
            frozen = index == 0 and not self.trained.full and not self.checkpointing
            if rule is None:
                how = Rows(self.rows, self.rows, False, False, self.checkpointing, frozen)
            else:
                attention = self.kept(rule[0])
                apart = rule[1] is not None
                mlp = self.kept(rule[1]) if apart else attention
                wanted = self.lemo.checkpoint_kept_rows
                checkpointed = self.checkpointing if wanted is None else wanted
                how = Rows(attention, mlp, True, apart, checkpointed, frozen)
            if how not in made:
                made[how] = layer_bytes(self.model, self.trained, how)
            layers.append(made[how])
        return layers

    def moments(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Moments at which a step may be at its peak: the phase, and the bytes of each part."""
        model, trained, size = self.model, self.trained, self.trained.weight
        adapters = 0 if trained.full else model.layers * trained.adapters(model)
        # What autocast makes of them stays as long as what layers save.
        plain = sum(layer.stored is None for layer in self.layers)
        casts = trained.copy and trained.autocast
        cast = max(1, plain) * trained.adapters(model) * trained.through if casts else 0
        gradients = model.parameters * size if trained.full else adapters * trained.adapter
        stream = self.rows * model.hidden * size
        always = {
            "weights": model.parameters * size,
            "adapters": adapters * trained.adapter + cast,
            "optimizer states": 2 * gradients,
            "cuBLAS workspaces": WORKSPACES,
            "ids, positions, kept sets": self._indices(),
        }
        # With adapters, checkpointing makes the embeddings' output a leaf, which stays to the end;
        # a stock first layer stores that very tensor.
        apart = self.rules[0] is not None or model.scaled_embeddings
        if self.checkpointing and not trained.full and apart:
            always["embeddings"] = stream
        saved = always | self._saved(model.layers)

        # A stock layer has its input besides what it adds to it.
        copies = 3 if self.rules[-1] is None else 2
        yield "forward", saved | {"stream": copies * stream, "forward": self.layers[-1].forward}

        final = self.rows * stock_norm(model, trained)
        for phase, size_of_loss in self._loss():
            yield phase, saved | {"final norm": final, "loss": size_of_loss}

        wide = self.rows * FP32 * model.hidden
        head = model.table * size if trained.full else 0
        norm = {"gradients": head, "final norm": wide, "backward": NORM_BACKWARD * wide}
        yield "backward of the final norm", saved | norm

        for phase, parts in self._backward(head):
            yield phase, always | {"stream gradient": stream} | parts

        # Embeddings that are the head's weight too have two gradients, which are added.
        twice = head if model.tied else 0
        end = {"gradients": gradients + twice, "stream gradient": stream}
        yield "backward of the embeddings", always | end
        yield "optimizer", always | {"gradients": gradients}

    def _backward(self, head: int) -> Iterator[tuple[str, dict[str, int]]]:
        """The moments of each layer's backward, from the last layer on."""
        model, trained = self.model, self.trained
        linears = {name: shape.parameters for name, shape in model.linears.items()}
        if trained.full:
            each = model.layer_parameters * trained.weight
            down = linears["down_proj"] * trained.weight
            mlp = sum(linears[name] for name in model.named(MLP_INPUTS)) * trained.weight + down
        else:
            each = down = mlp = trained.adapters(model) * trained.adapter
        for index in reversed(range(model.layers)):
            layer, rule = self.layers[index], self.rules[index]
            for phase, (held, freed) in layer.backward.items():
                in_mlp = phase == "backward of an MLP"
                parts = self._saved(index + 1)
                if layer.stored is None:
                    parts["MLP rows"] -= freed
                else:
                    # With a kept set of its own, an MLP is computed again by itself.
                    alone = in_mlp and rule is not None and rule[1] is not None
                    again = layer.mlp - freed + (0 if alone else layer.attention)
                    parts["recomputed layer"] = max(0, again - layer.shared)
                above = head + (model.layers - 1 - index) * each
                yield (
                    phase,
                    parts | {"gradients": above + (down if in_mlp else mlp), "backward": held},
                )

    def _saved(self, count: int) -> dict[str, int]:
        """What the first ``count`` layers keep for their backward."""
        plain = [layer for layer in self.layers[:count] if layer.stored is None]
        return {
            "attention rows": sum(layer.attention for layer in plain),
            "MLP rows": sum(layer.mlp for layer in plain),
            "stored rows": sum(layer.stored or 0 for layer in self.layers[:count]),
        }

    def _indices(self) -> int:
        """Bytes of ids, labels, positions and targets, of cos and sin, and of the kept sets."""
        sets = [1 if rule[1] is None else 2 for rule in self.rules if rule is not None]
        if sets and self.lemo.agree_across_layers:
            sets = sets[:1]
        tables = 2 * self.tokens * self.model.rotary * self.trained.weight
        return (4 + sum(sets)) * INT64 * self.rows + tables

    def _loss(self) -> Iterator[tuple[str, int]]:
        """The moments of the loss: what is held from the final hidden states on."""
        model, trained, size = self.model, self.trained, self.trained.weight
        hidden = self.rows * model.hidden * size
        if self.lemo is None:
            logits = self.rows * model.vocabulary
            # As the head returns them, in fp32, and their logarithmic softmax.
            yield "loss", hidden + logits * (2 * FP32 + (size if size < FP32 else 0))
            # That softmax, its gradient, and the logits'.
            yield "backward of the loss", (hidden if trained.full else 0) + 3 * FP32 * logits
            return
        segment = self.lemo.segment_size
        if segment is None:
            shape = torch.empty(self.rows, model.hidden, device="meta")
            segment = choose_segment_size(shape, model.vocabulary, trained.full)
        asked = self.rows
        if self.lemo.supervise == "kept":
            asked = max(self.rows if rule is None else self.kept(rule[0]) for rule in self.rules)
        # The gradient of all rows; a segment's logits, which their gradient overwrites, its rows
        # and their gradient.
        peak = 2 * hidden + min(segment, asked) * (model.vocabulary + 2 * model.hidden) * size
        if not trained.full:
            yield "loss", peak
            return
        # The weight's gradient is added up in fp32. Only under autocast or with fp32 weights does
        # a segment's own exist too.
        total = FP32 * model.table
        alone = model.table * size if trained.autocast or size == FP32 else 0
        yield "loss", peak + total + alone
        yield "loss", 2 * hidden + total + (model.table * size if size < FP32 else 0)
