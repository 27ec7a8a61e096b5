"""Pictures of evaluations, as PNG files; nothing else in the package needs matplotlib.

No display is needed, and no state of
`matplotlib.pyplot` is touched.
"""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

DPI = 150
# Told apart by readers who see no red or no green, and in this order also in grey.
COLORS = ("#1f6f8b", "#d1783c", "#6a4c93", "#3d8b5f", "#a33b5b", "#8a7a1f", "#555b61")
GREY, WRONG, RIGHT = "#6b7278", "#f3efe9", "#1f6f8b"
DASHES = ("--", ":", "-.", (0, (8, 3)), (0, (1, 3)))


def retrieval_figure(result: Any) -> Any:
    """Heat map of accuracy: a column for each length, a row for each depth, the start on top.

    Args:
        result: A `lemo_hf.eval.retrieval.Retrieval`. Where it has no cell for a length and a
            depth, the map stays empty.

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
    """A line for each result: loss of the tokens of a bucket, at the middle of their positions.

    The axis is logarithmic if the buckets grow with the position.

    Args:
        results: By name, buckets of positions: ``first`` and ``last`` (both included) and ``loss``
            in nats a token; no more is read of them.

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


def recall_figure(table: Sequence[Mapping[str, Any]]) -> Any:
    """Recall of the predictor, layer by layer, a panel for each head and retention.

    In a panel, a line for each documents. Baselines are dashed: their mean over layers and
    documents.

    Args:
        table: As `lemo_hf.recall.recall_table` returns it.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: No row is of policy ``"predictor"``.
    """
    heads, retentions, documents = (
        list(dict.fromkeys(row[name] for row in table if row["policy"] == "predictor"))
        for name in ("head", "retention", "documents")
    )
    if not heads:
        raise ValueError("the table has no row of policy 'predictor': make it with recall_table.")
    figure = _figure((1 + 4.6 * len(retentions), 1 + 3.3 * len(heads)))
    axes = figure.subplots(len(heads), len(retentions), sharex=True, sharey=True, squeeze=False)
    for head, line in zip(heads, axes, strict=True):
        for retention, axis in zip(retentions, line, strict=True):
            rows = [r for r in table if (r["head"], r["retention"]) == (head, retention)]
            _draw_recall(axis, rows, documents)
            axis.set_title(f"{head}, retention {retention:g}", loc="left", fontsize=11)
        line[0].set_ylabel("recall of the oracle's blocks")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        lines, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
    )
    return figure


def _draw_recall(axis: Any, rows: list[Mapping[str, Any]], documents: list[str]) -> None:
    """One head and retention."""
    baselines: dict[str, list[float]] = {}
    for row in rows:
        if row["policy"] == "predictor":
            y = [math.nan if value is None else value for value in row["layers"]]
            color = COLORS[documents.index(row["documents"]) % len(COLORS)]
            label = f"predictor, {row['documents']}"
            axis.plot(range(len(y)), y, color=color, lw=1.8, marker="o", ms=3.5, label=label)
        else:
            baselines.setdefault(row["policy"], []).append(row["mean"])
    means = {name: sum(values) / len(values) for name, values in baselines.items()}
    over = "layers" if len(documents) == 1 else "layers and documents"
    for number, mean in enumerate(means.values()):
        style = {"color": GREY, "lw": 1, "ls": DASHES[number % len(DASHES)], "zorder": 1}
        axis.axhline(mean, label=f"baselines, mean over {over}", **style)
    places = _spread(list(means.values()), 0.06)
    for (name, mean), place in zip(means.items(), places, strict=True):
        axis.annotate(
            f"{name} {mean:.2f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            color=GREY,
            fontsize=9,
            va="center",
        )
    axis.set_ylim(0, 1.02)
    axis.xaxis.get_major_locator().set_params(integer=True)
    _open(axis)


def _spread(values: list[float], gap: float) -> list[float]:
    """Places for labels at ``values``, moved as far as it takes to be ``gap`` apart."""
    order = sorted(range(len(values)), key=values.__getitem__)
    places = list(values)
    for _ in range(100):
        for low, high in pairwise(order):
            lack = gap - (places[high] - places[low])
            if lack > 1e-6:
                places[low] -= lack / 2
                places[high] += lack / 2
    # The topmost label stays inside the axes, and pushes the others down if it must.
    limit = 1.0
    for i in reversed(order):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


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
    figure.savefig(path, dpi=DPI, format="png")
