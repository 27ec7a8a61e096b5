"""The demo's picture: what LeMo kept of a row of each task, and what each way of training gave."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

KEPT, LEFT_OUT = "#1f6f8b", "#e6e9ec"
COLORS = {"dense": "#d1783c", "rows cut in half": "#9a9a9a", "LeMo": KEPT}


def draw(path: Path, tasks: list) -> None:
    """Write the picture.

    Args:
        path: Of the PNG file.
        tasks: Each with ``name``, ``lemo`` (its settings), ``kept`` (``[layers][blocks]``, 1 where
            a layer kept a block) and ``results`` by way of training.
    """
    figure = plt.figure(figsize=(12.5, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, wspace=0.03)
    axes = left.subplots(len(tasks), 1, sharex=True)
    for axis, task in zip(axes, tasks, strict=True):
        _draw_blocks(axis, task.kept, task.lemo.block_size)
        axis.set_title(f"{task.name}: a training row", fontsize=10, loc="left")
    axes[-1].set_xlabel("position in the row (tokens)")
    left.supylabel("layer (0 reads the embeddings)", fontsize=10)
    left.suptitle(f"What LeMo keeps, in blocks of {tasks[0].lemo.block_size} tokens")
    left.legend(
        handles=[Patch(color=KEPT, label="kept"), Patch(color=LEFT_OUT, label="left out")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    axes = right.subplots(len(tasks), 1)
    for axis, task in zip(axes, tasks, strict=True):
        _draw_results(axis, task)
    axes[-1].set_xlabel("held-out perplexity: less is better")
    right.suptitle("After the same time of training")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_results(axis, task) -> None:
    before = task.results["before"]["perplexity"]
    names = [name for name in COLORS if name in task.results]
    values = [task.results[name]["perplexity"] for name in names]
    bars = axis.barh(names, values, color=[COLORS[name] for name in names], height=0.6)
    axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=4)
    axis.axvline(before, color="black", lw=1, ls=":")
    axis.set_xlim(0, 1.12 * max(before, *values))
    axis.invert_yaxis()
    axis.set_title(f"{task.name} (dotted: before, {before:.2f})", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_blocks(axis, layers: list[list[int]], block_size: int) -> None:
    blocks = len(layers[0])
    colors = ListedColormap([LEFT_OUT, KEPT])
    axis.pcolormesh(layers, cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    ends = range(0, blocks + 1, max(1, blocks // 8))
    axis.set_xticks(ends, [f"{end * block_size:,}" for end in ends])
    axis.set_yticks([layer + 0.5 for layer in range(len(layers))], range(len(layers)), fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
