"""Quality against cost as a picture, from the benchmark's JSON alone.

One panel each for perplexity and retrieval against the time of a step alone on a GPU and against
the memory of a step. Settings that were not timed have no point in the panels of time.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.quality.results import COMPLETION, Setting, settings_of
from benchmarks.record import load

GROUPS = ("policy", "retention", "paper", "controls", "headline")
WORST = 1.15  # times dense: perplexities beyond are drawn at the edge, with their value
COLOURS = {"dense": "black", "LeMo": "tab:blue", "other": "tab:orange"}


def points(rows: list[dict]) -> list[Setting]:
    """Settings with a cost, each once; where a group has more seeds of one, those."""
    found: dict[str, Setting] = {}
    for group in GROUPS:
        for setting in settings_of(rows, group):
            seeds = len(found[setting.name].rows) if setting.name in found else 0
            if len(setting.rows) > seeds and (setting.timing or setting.peak_gib):
                found[setting.name] = setting
    return [setting for setting in found.values() if not setting.name.startswith(COMPLETION)]


def kind_of(setting: Setting) -> str:
    """A key of `COLOURS`."""
    if setting.is_dense:
        return "dense"
    row = setting.rows[0]
    return "LeMo" if row["lemo"] and not setting.name.startswith("random-LTD") else "other"


def plot(header: dict, rows: list[dict], path: Path) -> int:
    """Draw ``path``; how many settings it shows."""
    settings = points(rows)
    if not settings:
        raise SystemExit(
            "no setting was both evaluated and timed: run the groups policy and timing."
        )
    first = settings[0].rows[0]
    text, lengths = next(iter(first["perplexity"])), list(first["retrieval"]["accuracy"])
    edge = WORST * next((s for s in settings if s.is_dense), settings[0]).mean("perplexity", text)
    qualities: list[tuple[str, Callable[[Setting], float]]] = [
        (f"perplexity, {text}", lambda s: s.mean("perplexity", text)),
        (
            "questions answered, mean over lengths",
            lambda s: sum(s.mean("retrieval", "accuracy", n) for n in lengths) / len(lengths),
        ),
    ]
    costs: list[tuple[str, Callable[[Setting], float | None]]] = [
        ("ms a step", lambda s: s.step_ms),
        ("peak GiB allocated", lambda s: s.peak_gib),
    ]
    costs = [cost for cost in costs if any(cost[1](s) is not None for s in settings)]  # on a CPU
    size = (7 * len(costs) + 4, 10)
    figure, axes = pyplot.subplots(
        2, len(costs), figsize=size, squeeze=False, constrained_layout=True
    )
    for line, (quality, height) in zip(axes, qualities, strict=True):
        for axis, (cost, place) in zip(line, costs, strict=True):
            for number, setting in enumerate(settings, 1):
                x, y = place(setting), height(setting)
                if x is None:
                    continue
                label, mark = str(number), "o"
                if y > edge:
                    label, mark, y = f"{number}: {y:.1f}", "^", edge
                axis.plot(x, y, mark, color=COLOURS[kind_of(setting)], markersize=5)
                axis.annotate(label, (x, y), (4, 3), textcoords="offset points", fontsize=8)
            axis.set_xlabel(cost)
            axis.set_ylabel(quality)
            axis.grid(alpha=0.3)
    names = [
        pyplot.Line2D(
            [], [], color=COLOURS[kind_of(s)], marker="o", linestyle="", label=f"{number} {s.name}"
        )
        for number, s in enumerate(settings, 1)
    ]
    figure.legend(handles=names, loc="outside right upper", frameon=False)
    figure.suptitle(f"{header['gpu']}, equal tokens, commit {header['commit']}, {header['date']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return len(settings)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON file of run.py")
    parser.add_argument("output", type=Path, help="PNG file")
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot(*load(args.results), args.output)


if __name__ == "__main__":
    main()
