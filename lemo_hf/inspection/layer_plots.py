"""Pictures of an `Inspection`: informativeness, retention, kept blocks, sparsity against length."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lemo_hf.eval.plots import COLORS, _figure, _open, _token_axis, _tokens, save_figure
from lemo_hf.inspection.layers import SMALL, Inspection

KEPT, LEFT_OUT = "#1f6f8b", "#e6e9ec"


def save_figures(found: Inspection, directory: str | os.PathLike) -> list[Path]:
    """Write the four pictures as PNG files, and return their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (
        ("informativeness", informativeness_figure(found)),
        ("retention", retention_figure(found)),
        ("kept_blocks", kept_figure(found)),
        ("sparsity", sparsity_figure(found)),
    ):
        paths.append(directory / f"{name}.png")
        save_figure(figure, paths[-1])
    return paths


def informativeness_figure(found: Inspection) -> Any:
    """Heat map: the informativeness of each block in each layer, as a share of the layer's best."""
    rows = [[x / (max(row) or 1) for x in row] for row in found.informativeness]
    figure = _figure(_size(len(rows)))
    axis = figure.subplots()
    mesh = axis.pcolormesh(rows, cmap="viridis", vmin=0, vmax=1, rasterized=True)
    _over_position(axis, found, len(rows))
    axis.set_title(f"Informativeness of {found.block_size}-token blocks, dense pass")
    bar = figure.colorbar(mesh, ax=axis, fraction=0.05, pad=0.02)
    bar.set_label("share of the layer's best block")
    bar.outline.set_visible(False)
    return figure


def retention_figure(found: Inspection) -> Any:
    """Bars: the share of the blocks that attention and MLP of each layer kept."""
    layers = len(found.retention["attention"])
    figure = _figure((max(5.5, 0.25 * layers + 2), 3.8))
    axis = figure.subplots()
    attention, mlp = found.retention["attention"], found.retention["mlp"]
    if attention == mlp:
        axis.bar(range(layers), attention, width=0.7, color=COLORS[0], label="attention and MLP")
    else:
        for number, (name, values) in enumerate((("attention", attention), ("MLP", mlp))):
            places = [layer + (number - 0.5) * 0.4 for layer in range(layers)]
            axis.bar(places, values, width=0.38, color=COLORS[number], label=name)
    axis.set(xlabel="layer", ylabel="share of the blocks kept", ylim=(0, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(f"Retention by layer, mean {(_mean(attention) + _mean(mlp)) / 2:.2f}")
    _open(axis)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def kept_figure(found: Inspection) -> Any:
    """Which blocks the attention of each layer kept, over position and depth.

    MLPs have a panel of their own if they kept other blocks.
    """
    own = found.kept["mlp"] != found.kept["attention"]
    panels = ("attention", "mlp") if own else ("attention",)
    layers = len(found.kept["attention"])
    width, height = _size(layers)
    figure = _figure((width, height * len(panels)))
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = ListedColormap([LEFT_OUT, KEPT])
    for name, axis in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        axis.pcolormesh(found.kept[name], cmap=colors, vmin=0, vmax=1, rasterized=True)
        _over_position(axis, found, layers)
        axis.set_title(f"Blocks kept by {name if own else 'attention and MLP'}")
    figure.legend(
        handles=[Patch(color=KEPT, label="kept"), Patch(color=LEFT_OUT, label="left out")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def sparsity_figure(found: Inspection) -> Any:
    """Share of uninformative blocks against length: the mean, the least and the greatest of the
    layers."""
    figure = _figure((6.5, 4.2))
    axis = figure.subplots()
    lengths = list(found.sparsity)
    layers = list(found.sparsity.values())
    axis.plot(lengths, [_mean(x) for x in layers], color=COLORS[0], marker="o", ms=4, label="mean")
    low, high = [min(x) for x in layers], [max(x) for x in layers]
    axis.fill_between(lengths, low, high, color=COLORS[0], alpha=0.18, lw=0, label="layers")
    axis.set(xlabel="length of the text (tokens)", ylabel=f"blocks below {SMALL:g} of the largest")
    axis.set_ylim(0, 1.02)
    axis.set_xscale("log", base=2)
    _token_axis(axis, max(lengths))
    axis.set_xticks(lengths, [_tokens(length) for length in lengths])
    axis.set_title("Sparsity against length, dense passes")
    _open(axis)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _over_position(axis: Any, found: Inspection, layers: int) -> None:
    """Set ticks in tokens at the bottom and in layers at the side, layer 0 at the bottom."""
    blocks = len(found.informativeness[0])
    ends = range(0, blocks + 1, max(1, blocks // 8))
    axis.set_xticks(ends, [f"{end * found.block_size:,}" for end in ends])
    marks = range(0, layers, max(1, layers // 12))
    axis.set_yticks([layer + 0.5 for layer in marks], list(marks))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="position (tokens)", ylabel="layer (0 reads the embeddings)")


def _size(layers: int) -> tuple[float, float]:
    return 9.0, 1.8 + min(7.0, max(1.8, 0.22 * layers))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
