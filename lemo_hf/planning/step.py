"""What is alive at the moments of an optimizer step at which it may be at its peak."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from lemo_hf.batch.selection import LayerRows, num_kept_blocks
from lemo_hf.config import UNITS, KeepRule, LeMoConfig
from lemo_hf.kernels.segment_cross_entropy import WHOLE, choose_segment_size
from lemo_hf.memory.fitting import fitting_level
from lemo_hf.memory.offload import GIB, SLAB
from lemo_hf.planning.kept import ATTENTION, MLP, SUMS, Kept, kept_layer
from lemo_hf.planning.layer import (
    FP32,
    NORM_BACKWARD,
    LayerBytes,
    Trained,
    gradient_bytes,
    stock_layer,
    stock_norm,
)
from lemo_hf.planning.model import MLP_INPUTS, ModelShapes
from lemo_hf.planning.offload import Offload
from lemo_hf.planning.quantized import dequantized_bytes, layer_bytes, other_parameters

INT64 = 8
SIXTEEN_BIT = 2
DEQUANTIZED = "a dequantised weight"
# cuBLAS takes 32 MiB on Hopper (8 on other GPUs) for each thread that calls it: the forward's and
# the backward's. Source: PyTorch's notes, "CUDA semantics", cuBLAS workspaces.
WORKSPACES = 2 * 32 * 2**20


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step.

    Attributes:
        model: Its shapes.
        trained: What of it is trained.
        lemo: What is left out; None: the stock model.
        batch: Rows.
        tokens: Of a row.
        checkpointing: The model's gradient checkpointing is on.
        stock_offload: It offloads, as transformers does.
        room: Bytes of the device; None if that is not known.
        finish: It is one of the finish, which keeps as much as ``lemo.finish_retention`` says.
    """

    model: ModelShapes
    trained: Trained
    lemo: LeMoConfig | None
    batch: int
    tokens: int
    checkpointing: bool
    stock_offload: bool
    room: float | None
    finish: bool

    @property
    def rows(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.tokens

    @cached_property
    def rules(self) -> list[tuple[KeepRule, KeepRule | None] | None]:
        """What each layer keeps; None for one that keeps everything."""
        if self.lemo is None:
            return [None] * self.model.layers
        rules = self.lemo.layer_rules(self.model.layers)
        if not self.finish:
            return rules
        keep = KeepRule(self.lemo.finish_retention)
        return [pair and (keep, pair[1] and keep) for pair in rules]

    def kept(self, rule: KeepRule | None) -> int:
        """Rows of the batch that a rule keeps; the first and the last block are among them."""
        if rule is None or self.lemo is None:
            return self.rows
        if rule.threshold is not None or rule.retention is None:
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
    def levels(self) -> list[str]:
        """What each layer of LeMo's computes again."""
        assert self.lemo is not None  # asked for LeMo's steps alone
        levels = self.lemo.recompute_levels(self.model.layers)
        if not self.checkpointing or None not in levels:
            return [level or "none" for level in levels]
        chosen = self._fitting_level()
        return [level or chosen for level in levels]

    @cached_property
    def _layer_rows(self) -> list[LayerRows]:
        pairs = [(None, None) if rule is None else rule for rule in self.rules]
        return [(self.kept(one), None if own is None else self.kept(own)) for one, own in pairs]

    def _fitting_level(self) -> str:
        """What the first layer that asks decides: in a run's first step before optimizer states."""
        if self.room is None:
            return UNITS[0]
        states = self._always["optimizer states"]
        later = self.finish and self.lemo is not None and self.lemo.finish < 1
        there = sum(self._always.values()) + self._stream - (0 if later else states)
        return fitting_level(
            self._layer_rows,
            (self.batch, self.tokens, self.model.hidden),
            self.model.query,
            self.trained.weight,
            states // 2,
            self._slabs,
            int(self.room - there),
        )

    @property
    def _slabs(self) -> int:
        """Of pinned memory that may be taken."""
        budget = self.lemo and self.lemo.offload_gib
        return int(budget * GIB) // SLAB if budget else 0

    @cached_property
    def layers(self) -> list[LayerBytes]:
        """Every layer, the first one first."""
        model, trained = self.model, self.trained
        if self.lemo is None:
            made = [
                stock_layer(model, trained, self.rows, self.checkpointing, frozen)
                for frozen in (self._frozen, False)
            ]
            return [made[0], *made[1:] * (model.layers - 1)]
        make = cache(lambda how: kept_layer(model, trained, how))
        layers = []
        for index, (rows, level) in enumerate(zip(self._layer_rows, self.levels, strict=True)):
            attention, own = rows
            mlp, apart = (attention, False) if own is None else (own, True)
            layers.append(make(Kept(attention, mlp, apart, level, self._frozen and index == 0)))
        return layers

    @property
    def _frozen(self) -> bool:
        """Whether nothing before the first layer needs a gradient."""
        # Checkpointing makes embeddings ask for one; LeMo undoes that where it stands before them.
        asks = self.checkpointing and (self.lemo is None or self.model.scaled_embeddings)
        return not (self.trained.full or asks)

    @cached_property
    def offload(self) -> Offload:
        """What leaves the device."""
        stock = self.stock_offload and self.checkpointing and not self._slabs
        return Offload(self.layers, self._slabs, stock)

    @property
    def _stream(self) -> int:
        return self.rows * self.model.hidden * self.trained.weight

    @property
    def _dequantized(self) -> int:
        bits = self.trained.bits
        if bits is None:
            return 0
        # LLM.int8's weight takes the type of the linear's input.
        element = SIXTEEN_BIT if bits == 4 else self.trained.weight
        return dequantized_bytes(self.model, bits, element)

    @property
    def _gradients(self) -> int:
        model, trained = self.model, self.trained
        if trained.full:
            return model.parameters * trained.weight
        return model.layers * trained.adapters(model) * trained.adapter

    @cached_property
    def _always(self) -> dict[str, int]:
        """What is there all the time."""
        model, trained = self.model, self.trained
        adapters = 0 if trained.full else self._gradients
        bits = trained.bits
        weights = model.parameters if bits is None else other_parameters(model)
        return {
            "weights": weights * trained.weight,
            "quantised weights": 0 if bits is None else model.layers * layer_bytes(model, bits),
            "adapters": adapters,
            "optimizer states": 2 * self._gradients,
            "cuBLAS workspaces": WORKSPACES,
            "ids, positions, kept sets": self._indices(),
        }

    def moments(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Moments at which a step may be at its peak: the phase, and the bytes of each part."""
        model, trained, stream = self.model, self.trained, self._stream
        always = dict(self._always)
        always["adapters"] += self._casts()
        # With adapters, checkpointing makes the embeddings' output a leaf, which stays to the end
        # where the stream is not that very tensor.
        if self.checkpointing and not trained.full and model.scaled_embeddings:
            always["embeddings"] = stream

        # A stock layer has its input besides what it adds to it.
        copies = 3 if self.lemo is None else 1
        for index, layer in enumerate(self.layers):
            yield (
                "forward",
                _sum(
                    always,
                    self._saved(index),
                    layer.saved,
                    {
                        "stream": copies * stream,
                        "forward": layer.forward,
                        DEQUANTIZED: self._dequantized,
                        "offload in flight": self.offload.going(index),
                    },
                ),
            )

        head = model.table * trained.weight if trained.full else 0
        left = {"offload in flight": self.offload.coming(model.layers)}
        saved = _sum(always, self._saved(model.layers), left)
        yield from self._loss(saved, head)
        for phase, parts in self._backward(head):
            yield phase, _sum(always, parts)

        # Embeddings that are the head's weight too have two gradients, which are added.
        twice = head if model.tied else 0
        end = {"gradients": self._gradients + twice, "stream gradient": stream}
        yield "backward of the embeddings", always | end
        yield "optimizer", always | {"gradients": self._gradients}

    def _backward(self, head: int) -> Iterator[tuple[str, dict[str, int]]]:
        """The moments of each layer's backward, from the last layer on."""
        model, trained = self.model, self.trained
        each = model.layer_parameters * trained.weight
        if not trained.full:
            each = trained.adapters(model) * trained.adapter
        mlp = gradient_bytes(model, trained, (*model.named(MLP_INPUTS), "down_proj"))
        for index in reversed(range(model.layers)):
            layer = self.layers[index]
            below = self._saved(index)
            above = head + (model.layers - 1 - index) * each
            for phase, parts in layer.backward.items():
                own = layer.mlp_gradients if phase == MLP else mlp
                # LeMo's first layer hands no gradient on where nobody asks for it.
                ends = index == 0 and self.lemo is not None and self._frozen
                beside = {
                    "stream gradient": 0 if ends else self._stream,
                    "gradients": above + own,
                    "offload in flight": self.offload.coming(index),
                }
                if phase == MLP:
                    beside[DEQUANTIZED] = self._dequantized
                if phase == ATTENTION:  # a sum that came back is gone with the MLP's backward
                    beside[SUMS] = -dict(self.offload.leaving[index]).get(SUMS, 0)
                yield phase, _sum(below, parts, beside)

    def _casts(self) -> int:
        """Bytes of what autocast makes of adapters; it stays as long as what layers save."""
        model, trained = self.model, self.trained
        if not (trained.copy and trained.autocast):
            return 0
        mlp = trained.adapters(model, (*model.named(MLP_INPUTS), "down_proj"))
        attention = trained.adapters(model) - mlp
        counts = [
            max(1, sum(part in layer.saved for layer in self.layers))
            for part in ("attention rows", "MLP rows")
        ]
        if self.lemo is not None:  # rows of MLPs that run again are kept without their adapters
            counts[1] = max(1, self.levels.count("none"))
        return (counts[0] * attention + counts[1] * mlp) * trained.through

    def _saved(self, count: int) -> dict[str, int]:
        """What the first ``count`` layers keep on the device for their backward."""
        return _sum(*(self.offload.remaining(index) for index in range(count)))

    def _indices(self) -> int:
        """Bytes of ids and positions, of cos and sin, and of the kept sets."""
        sets = [1 if rule[1] is None else 2 for rule in self.rules if rule is not None]
        if sets and self.lemo is not None and self.lemo.agree_across_layers:
            sets = sets[:1]
        whole = int(self.lemo is not None and None in self.rules)  # that of dense layers
        wide = FP32 if self.model.norms_behind else self.trained.weight  # OLMo 2's stay in fp32
        tables = 2 * self.tokens * self.model.rotary * wide
        return (2 + sum(sets) + whole) * INT64 * self.rows + tables

    def _loss(self, saved: dict[str, int], head: int) -> Iterator[tuple[str, dict[str, int]]]:
        """The moments of the loss, from the last layer's output on."""
        model, trained, size, stream = self.model, self.trained, self.trained.weight, self._stream
        # Autocast casts an fp32 head, and what it returns is 16-bit.
        cast = trained.autocast and size == FP32
        logit = SIXTEEN_BIT if cast else size
        if cast:
            saved = saved | {"16-bit head": model.table * SIXTEEN_BIT}
        if self.lemo is None:
            logits = self.rows * model.vocabulary
            final = saved | {"targets": 2 * INT64 * self.rows}
            final["final norm"] = self.rows * stock_norm(model, trained)
            # As the head returns them, in fp32, and their logarithmic softmax.
            made = stream + logits * (2 * FP32 + (logit if logit < FP32 else 0))
            yield "loss", final | {"loss": made}
            # That softmax, its gradient, and the logits'.
            held = (stream if trained.full else 0) + 3 * FP32 * logits
            yield "backward of the loss", final | {"loss": held}
            wide = self.rows * FP32 * model.hidden
            norm = {"gradients": head, "final norm": wide, "backward": NORM_BACKWARD * wide}
            yield "backward of the final norm", saved | norm
            return
        segment = self.lemo.segment_size
        if segment is None:
            shape = torch.empty(self.rows, model.hidden, device="meta")
            segment = choose_segment_size(shape, model.vocabulary, trained.full)
        asked = self.rows
        if self.lemo.supervise == "kept":
            asked = max(self.kept(rule[0]) for rule in self.rules if rule is not None)
        # Logits, which their gradient overwrites, normed rows and their gradient, and the rows
        # themselves where they are not consecutive.
        copies = 2 if asked >= WHOLE * self.rows else 3
        # Labels, targets and where they are: before and after some are struck.
        targets = 4 * INT64 * self.rows
        streams = saved | {"stream": stream, "stream gradient": stream, "targets": targets}
        row = model.vocabulary * logit + copies * model.hidden * size
        if cast:  # normed rows and their gradient once more
            row += 2 * model.hidden * SIXTEEN_BIT
        peak = min(segment, asked) * row
        if not trained.full:
            yield "loss", streams | {"loss": peak}
            return
        # The weight's gradient is added up in fp32. Only under autocast or with fp32 weights does
        # a segment's own exist too.
        total = FP32 * model.table
        alone = model.table * size if trained.autocast or size == FP32 else 0
        yield "loss", streams | {"loss": peak + total + alone}
        yield "loss", streams | {"loss": total + (model.table * size if size < FP32 else 0)}


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    """Bytes by part, added up."""
    total: dict[str, int] = {}
    for some in parts:
        for name, size in some.items():
            total[name] = total.get(name, 0) + size
    return total
