"""Bytes of a decoder layer that goes LeMo's way, by its level of recomputation."""

from dataclasses import dataclass, replace

import torch

from lemo_hf.config import UNITS
from lemo_hf.memory.recompute import tile_rows
from lemo_hf.planning.layer import (
    FP32,
    LayerBytes,
    Trained,
    adapter_backward,
    attention_backward,
    attention_output,
    attention_saved,
    gradient_bytes,
    int8_forward,
    int8_inputs,
)
from lemo_hf.planning.model import ATTENTION_INPUTS, MLP_INPUTS, ModelShapes

MLP, ATTENTION = "backward of an MLP", "backward of an attention"  # phases
SUMS = "sums behind attention"


@dataclass(frozen=True)
class Kept:
    """How a layer runs.

    Attributes:
        attention: Rows of the batch that its attention reads.
        mlp: Rows that its MLP reads.
        apart: The MLP has a kept set of its own.
        level: Of recomputation.
        frozen: Nothing before it needs a gradient.
    """

    attention: int
    mlp: int
    apart: bool
    level: str
    frozen: bool


@dataclass(frozen=True)
class _Mlp:
    """Bytes a row of an MLP.

    Attributes:
        saved: By what is between a norm before and a norm behind it.
        behind: By a norm behind it.
        forward: Held beside that at the end of a forward that saves it.
        backward: Held beside it by the backward at its highest, what is freed subtracted.
        alone: Held by a forward that saves nothing.
        output: Of the output, where the backward's forward computes it.
    """

    saved: int
    behind: int
    forward: int
    backward: int
    alone: int
    output: int


def kept_layer(model: ModelShapes, trained: Trained, kept: Kept) -> LayerBytes:
    """Bytes of a layer of ``model`` that runs as ``kept`` says."""
    if trained.autocast and trained.weight < FP32:
        trained = replace(trained, copy=0)  # linears of LeMo's cast nothing that is 16-bit
    row, rows = model.hidden * trained.weight, kept.attention
    mlp = _mlp(model, trained)
    # A kernel's norm keeps its input's rows and norms them again.
    attention = rows * attention_saved(model, trained, row, kept.frozen, kept=True)
    outputs = rows * attention_output(model, trained)
    held_inputs = rows * int8_inputs(model, trained, mlp=False)
    stored = {"stored rows": rows * row, "inputs of 8-bit linears": held_inputs}
    leaves = [("stored rows", rows * row)]
    if kept.level in ("selective", "lean"):
        stored["attention outputs"] = outputs
        output = rows * model.query * trained.attention
        leaves += [("attention outputs", output), ("attention outputs", outputs - output)]
        if kept.level == "selective" and not kept.apart:
            stored[SUMS] = rows * row
            leaves.append((SUMS, rows * row))
    # Rows that stand below the recomputed ones, in the norm or as what projections read.
    reads = not kept.frozen and (not model.norms_behind or trained.shares(ATTENTION_INPUTS))
    shared = (rows * row if reads else 0) + stored.get("attention outputs", 0)
    again = max(0, attention - shared)
    unit = kept.level in UNITS
    below = stored if unit else {"attention rows": attention}
    whole = below | {"recomputed layer": again} if unit else below
    own = rows * row  # the gradient of the rows
    backward = {
        ATTENTION: whole | {"backward": own + rows * attention_backward(model, trained)},
    }
    if kept.level == "none":
        above = row
        if kept.frozen and not trained.reaches((*ATTENTION_INPUTS, "o_proj")):
            above = row if model.norms_behind else 0  # no gradient goes further than the MLP
        saved = below | {"MLP rows": kept.mlp * (above + mlp.saved)}
        held = kept.mlp * (row + mlp.backward)
        return LayerBytes(
            saved=saved,
            forward=kept.mlp * mlp.forward,
            backward={MLP: saved | {"backward": held}} | backward,
            mlp_gradients=gradient_bytes(model, trained, ("down_proj",)),
        )
    # The sum of rows and update, or with a set of its own the rows.
    total = kept.mlp * row
    new = 0 if SUMS in below else total
    tile = _tile(model, trained, kept.mlp)
    saved = below | {"MLP rows": total} if kept.apart or not unit else below
    # The gradient that came, perhaps scaled as the update's, and that of the sum.
    held = kept.mlp * (3 if model.scaled_updates else 2) * row
    in_mlp = (below if kept.apart else whole) | {
        "MLP rows": new,
        "row gradients": held,
        "MLP tile": tile * (mlp.behind + mlp.saved + mlp.backward + mlp.output),
    }
    tiles = kept.mlp // tile
    made = max(2 * total if kept.mlp > tile else 0, (tiles - 1) * tile * row + tile * mlp.alone)
    pending = 0 if kept.apart else total + (new if unit else 0)  # the update, the sum
    scores = rows * _attention_forward(model, trained) if unit else 0
    return LayerBytes(
        saved=saved,
        forward=max(pending + made, scores),
        backward={MLP: in_mlp} | backward,
        may_leave=tuple(leaves) if unit else (),
        mlp_gradients=_mlp_gradients(model, trained, -(-kept.mlp // tile)),
    )


def _mlp(model: ModelShapes, trained: Trained) -> _Mlp:
    hidden, inner, size = model.hidden, model.intermediate, trained.weight
    row = hidden * size
    active = trained.inputs(("down_proj",), inner)
    reads = trained.inputs(model.named(MLP_INPUTS), hidden)
    normed = 0 if model.norms_behind else row
    # What the MLP read, the last projection's input and output.
    leaving = 0 if trained.shares(MLP_INPUTS) else normed
    leaving += row + (0 if trained.shares(("down_proj",)) else inner * size)
    # An adapter's output, and that scaled, where PEFT computes it.
    wide = "down_proj" in trained.targets and bool(trained.copy or trained.bits)
    scaled = 2 * trained.through * hidden if wide else 0
    # By the time of the gate, the output projection and a norm behind it are done.
    behind = row if model.norms_behind else 0
    entering = int8_forward(model, trained)
    entered = entering - 2 * inner * size - active
    held = max(3 * inner * size - active, entered, adapter_backward(trained, inner, active))
    # The last product is not run again where nothing but the layer's output reads it.
    left_out = not (trained.full or wide or trained.bits or model.norms_behind or model.drops)
    return _Mlp(
        saved=reads + 2 * inner * size + active,
        behind=behind,
        forward=max(leaving + scaled, entered),
        backward=held - behind,
        alone=normed + max(3 * inner * size, entering, inner * size + row + scaled),
        output=0 if left_out else row,
    )


def _attention_forward(model: ModelShapes, trained: Trained) -> int:
    """Bytes a row that attention's forward holds beside its rows: their norm, and the projections
    before and after the rotation."""
    wide = 2 * model.query + 3 * model.key_value
    return (wide + (0 if model.norms_behind else model.hidden)) * trained.weight


def _tile(model: ModelShapes, trained: Trained, rows: int) -> int:
    kind = {2: torch.bfloat16, FP32: torch.float32}[trained.weight]
    shape = torch.empty(1, rows, model.hidden, dtype=kind, device="meta")
    return tile_rows(shape, model.intermediate)


def _mlp_gradients(model: ModelShapes, trained: Trained, tiles: int) -> int:
    """Bytes of gradients of what the MLP trains: those of a tile, and the sum over earlier ones."""
    names = (*model.named(MLP_INPUTS), "down_proj")
    summed = gradient_bytes(model, trained, names) if tiles > 1 else 0
    if tiles > 2:  # added up in fp32 from the second on
        summed = summed * FP32 // (trained.weight if trained.full else trained.adapter)
    return summed + gradient_bytes(model, trained, ("down_proj",))
