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
        kept: ``[layers, blocks]``, 1 where a layer kept a block of one sample.
        results: Of the runs ``"dense"`` and ``"LeMo"``, with ``"loss"`` and ``"perplexity"``.
        config: LeMo's settings.
    """
    layers, blocks = kept.shape
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    left.pcolormesh(
        kept, cmap=ListedColormap([LEFT_OUT, KEPT]), vmin=0, vmax=1, edgecolors="white", lw=1
    )
    ends = range(0, blocks + 1, max(1, blocks // 8))
    left.set_xticks(ends, [f"{end * config.block_size}" for end in ends])
    left.set_yticks([layer + 0.5 for layer in range(layers)], range(layers))
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set(
        title=f"Blocks of {config.block_size} tokens kept by each layer, one training sample",
        xlabel="position in the sequence (tokens)",
        ylabel="layer (0 reads the embeddings)",
    )
    left.legend(
        handles=[Patch(color=KEPT, label="kept"), Patch(color=LEFT_OUT, label="left out")],
        loc="upper left",
        bbox_to_anchor=(0, -0.14),
        ncols=2,
        frameon=False,
    )
    for name, color in (("dense", DENSE), ("LeMo", KEPT)):
        loss = results[name]["loss"]
        label = f"{name}: held-out perplexity {results[name]['perplexity']:.2f}"
        right.plot(range(1, len(loss) + 1), loss, color=color, lw=1.6, label=label)
    right.set(
        title="Training loss at equal steps",
        xlabel="optimizer step",
        ylabel="loss (nats a token; LeMo: kept tokens)",
    )
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
