"""Pictures of the benchmarks, from their JSON alone.

``timeline.png``: what memory holds over a step. ``growth.png``: time and memory of a step against
tokens, for each provider.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
COLOURS = pyplot.get_cmap("tab10").colors
GROWTH = ("hf+checkpointing", "liger+checkpointing", "lemo+checkpointing", "lemo+offload")
NAMES = {
    "hf+checkpointing": "Hugging Face + checkpointing",
    "liger+checkpointing": "Liger + checkpointing",
    "lemo+checkpointing": "LeMo + checkpointing",
    "lemo+offload": "LeMo + offload",
}


def read(name: str) -> list[tuple[dict, list[dict]]]:
    """Header and rows of the results of that name, one a GPU."""
    files = sorted(HERE.glob(f"results/*/{name}.json"))
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [(content["header"], content["rows"]) for content in contents]


def plot_timeline(header: dict, rows: list[dict], path: Path) -> None:
    """One panel a provider: stacked GiB by origin over ms."""
    figure, axes = pyplot.subplots(
        len(rows), 1, figsize=(10, 4 * len(rows)), squeeze=False, constrained_layout=True
    )
    for axis, row in zip(axes[:, 0], rows, strict=True):
        times, *parts = zip(*row["series"], strict=True)
        axis.stackplot(times, *parts, labels=row["origins"], colors=COLOURS, step="post")
        axis.axhline(row["peak_gib"], color="black", linewidth=0.8, linestyle=":")
        kept = "" if row["retention"] is None else f", retention {row['retention']:g}"
        axis.set_title(
            f"{row['provider']}, {header['model']} shapes, {row['tokens']:,} tokens{kept}: "
            f"peak {row['peak_gib']:.1f} GiB ({header['gpu']})"
        )
        axis.set_xlabel("ms since the step began, as the host allocates")
        axis.set_ylabel("GiB allocated")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, reverse=True)
        axis.margins(x=0)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def growth_points(rows: list[dict], provider: str) -> tuple[list[tuple], list[tuple]]:
    """(tokens, s) and (tokens, GiB) of the model's steps with checkpointing.

    Memory is that of the real step, or of the dry one where no real one was taken.
    """
    times, peaks = {}, {}
    for row in rows:
        if row["provider"] != provider or row["model"] != "Llama-3 8B":
            continue
        tokens = row["tokens"]
        if row["status"] == "ok":
            times[tokens] = row["ms_median"] / 1e3
            peaks[tokens] = row["peak_gib"]
        elif "dry_peak_gib" in row:
            peaks.setdefault(tokens, row["dry_peak_gib"])
    return sorted(times.items()), sorted(peaks.items())


def plot_growth(header: dict, rows: list[dict], path: Path) -> None:
    """Time and memory against tokens, both axes logarithmic."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for provider, colour in zip(GROWTH, COLOURS, strict=False):
        for axis, points in zip(axes, growth_points(rows, provider), strict=True):
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=NAMES[provider])
    lengths = sorted({row["tokens"] for row in rows if row["provider"] in GROWTH})
    for axis, title in zip(axes, ("s a step", "peak GiB allocated"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(lengths, [f"{tokens // 1024}K" for tokens in lengths])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_title(f"{title}, Llama-3 8B shapes, {header['gpu']}")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS, help="directory of the pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for header, rows in read("bench_timeline"):
        plot_timeline(header, rows, args.output / "timeline.png")
    for header, rows in read("bench_step"):
        plot_growth(header, rows, args.output / "growth.png")


if __name__ == "__main__":
    main()
