"""Markdown tables of the quality benchmark, one a group, from its JSON alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Setting, settings_of
from benchmarks.record import load

TITLES = {
    "recipe": "Dense recipes",
    "policy": "Policies",
    "retention": "Retention",
    "block": "Tokens a block",
    "sets": "Kept sets",
    "dense_layers": "Dense first layers",
    "mlp": "Attention alone",
    "supervise": "Loss on kept tokens or on all",
    "paper": "The paper's setting",
    "controls": "Other ways to save",
    "completion": "Completion-only fine-tuning",
    "headline": "Headline settings, seeds together, equal tokens",
    "equal_time": "Equal wall-clock",
}


def changes(setting: Setting, text: str) -> str:
    """Against dense: the mean, and the range over seeds if there are several."""
    found = [] if setting.is_dense else setting.changes("perplexity", text)
    if not found:
        return ""
    mean = f"{sum(found) / len(found):+.1%}"
    return mean if len(found) == 1 else f"{mean} ({min(found):+.1%} to {max(found):+.1%})"


def group_table(rows: list[dict], group: str) -> str:
    """Markdown of one group; empty if nothing of it was measured."""
    settings = settings_of(rows, group)
    if not settings:
        return ""
    first = settings[0].rows[0]
    texts, lengths = list(first["perplexity"]), list(first["retrieval"]["accuracy"])
    head = ["trained", "seeds", "steps", "kept, attention / MLP"]
    for text in texts:
        head += [f"{text} (end)", "against dense"]
    head += [f"found at {int(length):,}" for length in lengths]
    head += ["nats an answer", "ms a step", "peak GiB"]
    lines = [head, ["---"] * len(head)]
    for setting in settings:
        row = setting.rows[0]
        steps = sorted({r["steps"] for r in setting.rows})
        kept = [f"{row.get(f'{part}_retention', 1):.2f}" for part in ("attention", "mlp")]
        line = [
            setting.name,
            str(len(setting.rows)),
            " to ".join(map(str, steps[:: len(steps) - 1 or 1])),
        ]
        line.append(" / ".join(kept))
        for text in texts:
            whole, end = setting.mean("perplexity", text), setting.mean("late_perplexity", text)
            line += [f"{whole:.2f} ({end:.2f})", changes(setting, text)]
        for length in lengths:
            line.append(f"{setting.mean('retrieval', 'accuracy', length):.0%}")
        line.append(f"{setting.mean('retrieval', 'log_probability', lengths[-1]):.1f}")
        line.append("" if setting.step_ms is None else f"{setting.step_ms:.0f}")
        line.append("" if setting.peak_gib is None else f"{setting.peak_gib:.1f}")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary_table(rows: list[dict], groups: Sequence[str]) -> str:
    """Markdown: quality, time and memory of the settings of ``groups`` in few columns; what is
    found is the mean over lengths."""
    settings = {}
    for group in groups:
        for setting in settings_of(rows, group):
            late = ", as long as dense" if group == "equal_time" else ""
            settings.setdefault(setting.name + late, setting)
    first = next(iter(settings.values())).rows[0]
    texts, lengths = list(first["perplexity"]), list(first["retrieval"]["accuracy"])
    head = ["trained", "seeds", "steps", *(f"perplexity, {text}" for text in texts)]
    head += ["found", "ms a step", "peak GiB"]
    lines = [head, ["---"] * len(head)]
    for name, setting in settings.items():
        line = [name, str(len(setting.rows)), str(setting.rows[0]["steps"])]
        for text in texts:
            mean, change = f"{setting.mean('perplexity', text):.2f}", changes(setting, text)
            line.append(f"{mean}, {change}" if change else mean)
        found = [setting.mean("retrieval", "accuracy", length) for length in lengths]
        line.append(f"{sum(found) / len(found):.0%}")
        line.append("" if setting.step_ms is None else f"{setting.step_ms:.0f}")
        line.append("" if setting.peak_gib is None else f"{setting.peak_gib:.1f}")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def timing_table(rows: list[dict]) -> str:
    """Markdown: cost of each setting alone on a GPU; empty if none was measured."""
    timed = [row for row in rows if row["status"] == "ok" and not row["evaluate"]]
    if not timed:
        return ""
    lines = [["trained", "rows a step", "ms a step", "peak GiB"], ["---"] * 4]
    for row in sorted(timed, key=lambda row: -row["step_ms"]):
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        lines.append([row["setting"], str(row["batch"]), f"{row['step_ms']:.1f}", peak])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def all_tables(header: dict, rows: list[dict]) -> str:
    """Every group that was measured, what went wrong, and how to reproduce it."""
    parts, shown = [], set()
    for group, title in TITLES.items():
        names = {row["name"] for row in rows if group in row["groups"]}
        if not names <= shown and (table := group_table(rows, group)):
            parts.append(f"### {title}\n\n{table}")
        shown |= names  # a group of rows that others lent it says nothing
    if timing := timing_table(rows):
        parts.append(f"### Step time and memory, alone on a GPU\n\n{timing}")
    if wrong := [row for row in rows if row["status"] != "ok"]:
        lines = [f"- {row['name']}: {row['status']}" for row in wrong]
        parts.append("### Without a result\n\n" + "\n".join(lines))
    versions = ", ".join(
        f"{name} {header[name]}" for name in ("torch", "triton", "transformers", "peft")
    )
    before = next((row for row in rows if row["name"] == "base" and row["status"] == "ok"), None)
    untrained = ""
    if before is not None:
        values = ", ".join(f"{name} {value:.1f}" for name, value in before["perplexity"].items())
        untrained = f"Before fine-tuning: {values}. "
    commands = "\n".join(header["commands"])
    parts.append(
        f"{untrained}{header['gpu']}, {versions}, commit `{header['commit']}`, {header['date']}. "
        f"*End*: the last quarter of a window's tokens.\n\n```bash\n{commands}\n```"
    )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON file of run.py")
    print(all_tables(*load(parser.parse_args(argv).results)))


if __name__ == "__main__":
    main()
