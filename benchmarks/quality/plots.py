"""Quality for wall-clock and memory, every control beside LeMo, from the JSON alone."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.quality.job import DENSE
from benchmarks.quality.results import Setting, settings_of
from benchmarks.quality.tables import span_of
from benchmarks.record import load

COLOURS = {"dense": "black", "LeMo": "tab:blue", "rows cut": "tab:orange", "S²-Attn": "tab:red"}
Figures = Callable[[Setting], list[float]]  # one a seed


def kind_of(setting: Setting) -> str:
    """A key of `COLOURS`."""
    row = setting.first
    if row["attention"] == "s2":
        return "S²-Attn"
    if row["cut"] > 1:
        return "rows cut"
    return "dense" if row["lemo"] == DENSE else "LeMo"


def panels(task: str, last: str) -> dict[str, Figures]:
    """What is drawn of a task, by its label."""
    if task == "text":
        return {
            "book text: perplexity, less is better": lambda s: s.values("perplexity"),
            "book text: values found": lambda s: s.answered("value", last),
        }
    if task == "summary":
        figures = {
            "news: nats a summary token, less is better": lambda s: s.values(
                "asked", last, "summary", "nats"
            )
        }
        return figures
    name = {
        "lexical": "questions with words in common",
        "hidden": "questions without words in common",
    }[task]
    return {f"{name}: answered exactly": lambda s: s.answered(None, last)}


def plot(rows: list[dict], path: Path, tokens: int, title: str) -> int:
    """Draw ``path``: a line a setting, its seeds and their mean; how many settings it shows.

    Runs of as many steps are not comparable with runs of as much time, and are in the tables alone.
    """
    settings = [
        setting
        for setting in settings_of(rows)
        if setting.first["tokens"] == tokens and setting.first["seconds"]
    ]
    if not settings:
        raise SystemExit(f"no job with rows of {tokens} tokens and a time ended well")
    tasks = list(dict.fromkeys(setting.first["task"] for setting in settings))
    drawn = [(t, *panel) for t in tasks for panel in panels(t, str(tokens)).items()]
    counts = [sum(s.first["task"] == task for s in settings) for task, _, _ in drawn]
    figure, axes = pyplot.subplots(
        len(drawn),
        figsize=(11, 0.27 * sum(counts) + 0.9 * len(drawn)),
        height_ratios=[count + 1 for count in counts],
        squeeze=False,
        constrained_layout=True,
    )
    for axis, (task, label, figures) in zip(axes[:, 0], drawn, strict=True):
        some = [s for s in settings if s.first["task"] == task]
        some.sort(key=lambda s: sum(figures(s)) / len(s.rows))
        for place, setting in enumerate(some):
            values, colour = figures(setting), COLOURS[kind_of(setting)]
            axis.plot(values, [place] * len(values), "|", color=colour, markersize=7)
            axis.plot(sum(values) / len(values), place, "o", color=colour, markersize=5)
        axis.set_yticks(range(len(some)), [_label(s) for s in some], fontsize=8)
        for text, setting in zip(axis.get_yticklabels(), some, strict=True):
            text.set_color(COLOURS[kind_of(setting)])
        axis.set_ylim(-0.7, len(some) - 0.3)
        axis.set_title(label, fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.3)
    shown = {kind_of(s) for s in settings}
    dots = {
        kind: pyplot.Line2D([], [], marker="o", linestyle="", color=colour)
        for kind, colour in COLOURS.items()
        if kind in shown
    }
    figure.legend(dots.values(), dots.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return len(settings)


def _label(setting: Setting) -> str:
    """Arm, time and memory."""
    gib = setting.mean("gib_a_row")
    memory = "" if gib is None else f", {gib:.1f} GiB a row"
    return f"{setting.first['arm']}, {span_of(setting)}{memory}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON file of results.py")
    parser.add_argument("output", type=Path, help="PNG file")
    parser.add_argument("--tokens", type=int, default=32768, help="of a row")
    args = parser.parse_args(argv)
    header, rows = load(args.results)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    title = f"rows of {args.tokens:,} tokens, {header['gpu']}: mean (dot) and seeds (bars)"
    plot(rows, args.output, args.tokens, title)


if __name__ == "__main__":
    main()
