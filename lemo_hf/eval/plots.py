"""Pictures of evaluations as PNG files, made with matplotlib.

No display is needed, and no state of
`matplotlib.pyplot` is touched.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lemo_hf.storage.files import whole_file

DPI = 150
# Told apart by readers who see no red or no green, and in this order also in grey.
COLORS = ("#1f6f8b", "#d1783c", "#6a4c93", "#3d8b5f", "#a33b5b", "#8a7a1f", "#555b61")
GREY, WRONG, RIGHT = "#6b7278", "#f3efe9", "#1f6f8b"


def retrieval_figure(result: Any) -> Any:
    """Heat map of accuracy: a column for each length and a row for each depth, the start on top.

    Args:
        result: Result of `lemo_hf.eval.retrieval.retrieval`. The map is empty where it has no cell
            for a length and a depth.

    Returns:
        A matplotlib figure.
    """
    lengths, depths = result.lengths, result.depths
    size = (2.6 + max(2.6, 0.6 * len(lengths)), 1.9 + max(1.4, 0.42 * len(depths)))
    figure = _figure(size)
    from matplotlib.colors import LinearSegmentedColormap

    axis = figure.subplots()
    values = [
        [math.nan if value is None else value for value in row] for row in result.grid("accuracy")
    ]
    colors = LinearSegmentedColormap.from_list("accuracy", [WRONG, "#8fbccb", RIGHT])
    mesh = axis.pcolormesh(values, cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=1)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                color = "white" if value > 0.8 else "#2b2f33"
                axis.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", color=color)
    axis.invert_yaxis()
    axis.set_xticks([x + 0.5 for x in range(len(lengths))], map(_tokens, lengths))
    axis.set_yticks([y + 0.5 for y in range(len(depths))], [f"{d:.0%}" for d in depths])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="length of prompt and answer (tokens)", ylabel="depth of the needle")
    samples = sorted({cell["samples"] for cell in result.cells})
    count = str(samples[0]) if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    axis.set_title(f"Retrieval accuracy, mean {result.mean():.2f} ({count} rows a cell)")
    bar = figure.colorbar(mesh, ax=axis, ticks=[0, 0.5, 1], fraction=0.05, pad=0.02, aspect=20)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def loss_by_position_figure(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """A line for each result: the loss of each bucket, at the middle of its positions.

    The axis is logarithmic if the buckets grow with the position.

    Args:
        results: Buckets of positions, by name of the result: ``first`` and ``last`` (both included)
            and ``loss`` in nats a token.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: There is no bucket.
    """
    buckets = [bucket for result in results.values() for bucket in result]
    if not buckets:
        raise ValueError("there is no bucket to draw: evaluate at least one row of tokens.")
    figure = _figure((7.5, 4.6))
    axis = figure.subplots()
    widths = [bucket["last"] - bucket["first"] + 1 for bucket in buckets]
    grows = max(widths) >= 4 * min(widths)
    for number, (name, result) in enumerate(results.items()):
        x = [_middle(bucket, grows) for bucket in result]
        y = [bucket["loss"] for bucket in result]
        style = "-" if number < len(COLORS) else "--"
        color = COLORS[number % len(COLORS)]
        axis.plot(x, y, style, color=color, lw=1.8, marker="o", ms=4, label=name)
    if grows:
        axis.set_xscale("log", base=2)
    _token_axis(axis, max(bucket["last"] for bucket in buckets) + 1)
    axis.set(xlabel="position (tokens of context)", ylabel="loss (nats a token)")
    axis.set_title("Loss by position")
    _open(axis)
    figure.legend(loc="outside lower center", ncols=min(3, len(results)), frameon=False)
    return figure


def _middle(bucket: Mapping[str, Any], geometric: bool) -> float:
    first, last = bucket["first"], bucket["last"]
    return math.sqrt((first + 1) * (last + 1)) if geometric else (first + last) / 2


def _token_axis(axis: Any, end: int) -> None:
    """Ticks at round numbers of tokens, written as lengths are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

    if axis.get_xscale() == "log":
        axis.xaxis.set_major_locator(LogLocator(2, numticks=12))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.set_xlim(0, end)
        axis.xaxis.set_major_locator(MultipleLocator(2 ** max(0, round(math.log2(end / 6)))))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(round(value))))


def _tokens(count: int) -> str:
    """``8K`` for 8,192; other numbers in full."""
    return f"{count // 1024:,}K" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def _open(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "lemo-hf[plot]"') from error
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure of this module as PNG."""
    with whole_file(path) as part:
        figure.savefig(part, dpi=DPI, format="png")


def check_plots() -> None:
    """Raises ImportError if no picture can be drawn; called before hours of work."""
    _figure((1, 1))
