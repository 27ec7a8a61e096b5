"""The demo's picture: what each layer kept, and what both runs learnt."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

KEPT, LEFT_OUT, DENSE = "#1f6f8b", "#e6e9ec", "#d1783c"


def draw(path: Path, kept, results: dict, config) -> None:
    """Write the picture.

    Args:
        path: Of the PNG file.
        kept: ``[samples, layers, blocks]``, 1 where a layer kept a block; two samples are drawn.
        results: Of the runs ``"dense"`` and ``"LeMo"``, with ``"loss"`` and ``"perplexity"``.
        config: LeMo's settings.
    """
    figure = plt.figure(figsize=(12.5, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, wspace=0.03)
    axes = left.subplots(2, 1, sharex=True)
    for number, (axis, sample) in enumerate(zip(axes, kept, strict=False), start=1):
        _draw_blocks(axis, sample, config.block_size)
        axis.set_title(f"training sample {number}", fontsize=10, loc="left")
    axes[-1].set_xlabel("position in the sequence (tokens)")
    left.supylabel("layer (0 reads the embeddings)", fontsize=10)
    left.suptitle(f"What each layer keeps, in blocks of {config.block_size} tokens")
    left.legend(
        handles=[Patch(color=KEPT, label="kept"), Patch(color=LEFT_OUT, label="left out")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )

    axis = right.subplots()
    for name, color in (("dense", DENSE), ("LeMo", KEPT)):
        loss = results[name]["loss"]
        label = f"{name}, held-out perplexity {results[name]['perplexity']:.2f}"
        axis.plot(range(1, len(loss) + 1), loss, color=color, lw=1.6, label=label)
    right.suptitle("Training loss, same data at the same step")
    axis.set_title(
        f"held-out perplexity before: {results['before']['perplexity']:.2f}",
        fontsize=10,
        loc="left",
    )
    axis.set(xlabel="optimizer step", ylabel="loss (nats a token; LeMo: kept tokens only)")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_blocks(axis, sample, block_size: int) -> None:
    layers, blocks = sample.shape
    colors = ListedColormap([LEFT_OUT, KEPT])
    axis.pcolormesh(sample, cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    ends = range(0, blocks + 1, max(1, blocks // 8))
    axis.set_xticks(ends, [f"{end * block_size:,}" for end in ends])
    axis.set_yticks([layer + 0.5 for layer in range(layers)], range(layers), fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
