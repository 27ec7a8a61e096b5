"""Markdown tables of the quality benchmark, from its JSON alone: means, and ranges over seeds."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality.facts import HIDDEN_KINDS, LEXICAL_KINDS
from benchmarks.quality.results import Setting, settings_of
from benchmarks.record import load

Column = tuple[str, Callable[[Setting], str]]
TITLES = {
    "lexical": "Completion, questions that share words with the place of their answer",
    "hidden": "Completion, questions that share no words with the place of their answer",
    "summary": "Summaries of news (LongBench's multi_news)",
    "text": "Book text, all tokens labelled",
}


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the range where there are several seeds."""
    if not values:
        return ""
    mean = format(sum(values) / len(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)}–{format(max(values), form)})"


def figure(form: str, *path: str) -> Callable[[Setting], str]:
    """A figure of the rows themselves."""
    return lambda setting: spread(setting.values(*path), form)


def answered(kind: str | None, length: str) -> Callable[[Setting], str]:
    """Share answered exactly."""
    return lambda setting: spread(setting.answered(kind, length), ".2f")


def thousands(length: str) -> str:
    """Tokens in short."""
    return f"{int(length) // 1024}K" if int(length) >= 1024 else length


def quality_columns(task: str, lengths: list[str], kinds: list[str]) -> list[Column]:
    """What a task is measured by."""
    last = lengths[-1]
    if task == "summary":
        nats = [("asked", n, "summary", "nats") for n in lengths]
        return [
            (f"nats a token at {thousands(n)}", figure(".3f", *path))
            for n, path in zip(lengths, nats, strict=True)
        ]
    columns: list[Column] = []
    if task == "text":
        columns = [
            ("perplexity", figure(".2f", "perplexity")),
            ("of key tokens", figure(".2f", "key_perplexity")),
            *((f"values at {thousands(n)}", answered("value", n)) for n in lengths),
            (f"nats a quotation token, {thousands(last)}", _nats("quotation", last)),
        ]
    elif task == "lexical":
        columns = [
            (f"{kind}s at {thousands(n)}", answered(kind, n)) for kind in kinds for n in lengths
        ]
    else:
        columns = [
            *((f"mean at {thousands(n)}", answered(None, n)) for n in lengths),
            *((f"{kind}, {thousands(last)}", answered(kind, last)) for kind in kinds),
            (f"nats a token, {thousands(last)}", _mean_nats(kinds, last)),
        ]
    return columns


def _nats(kind: str, length: str) -> Callable[[Setting], str]:
    return figure(".2f", "asked", length, kind, "nats")


def _mean_nats(kinds: list[str], length: str) -> Callable[[Setting], str]:
    def mean(setting: Setting) -> str:
        found = [setting.values("asked", length, kind, "nats") for kind in kinds]
        return spread([sum(x) / len(x) for x in zip(*found, strict=True)], ".2f")

    return mean


# The arms that the README shows, and what it calls them.
README = {
    "lexical": {
        "dense": "dense",
        "dense, rate 0.002": "dense, learning rate 0.002",
        "rows cut to 1/2": "rows cut to 1/2",
        "rows cut to 1/8": "rows cut to 1/8",
        "S²-Attn": "S²-Attn",
        "overlap 0.3, a quarter random": "LeMo, retention 0.3 (the default)",
        "overlap 0.3, a quarter random, CUDA graphs": "LeMo, retention 0.3, `cuda_graphs`",
        "overlap 0.1, a quarter random, CUDA graphs, 4 rows a step": (
            "LeMo, retention 0.1, `cuda_graphs`"
        ),
        "overlap 0.1, a quarter random, CUDA graphs, dense finish of as many rows, 4 rows a step": (
            "the same, `dense_finish=0.02`"
        ),
        "overlap 0.1, a quarter random, CUDA graphs, dense finish, 4 rows a step": (
            "the same, the last 30 % of the time dense, 1 row a step"
        ),
        "overlap 0.05, a quarter random, CUDA graphs, 8 rows a step": (
            "LeMo, retention 0.05, `cuda_graphs`"
        ),
    },
    "text": {
        "dense": "dense",
        "dense, rate 0.002": "dense, learning rate 0.002",
        "rows cut to 1/2, dense finish": "rows cut to 1/2, dense finish",
        "S²-Attn": "S²-Attn",
        "the default: chunks 0.3, dense finish": (
            "LeMo, retention 0.3, dense finish (the default), `cuda_graphs`"
        ),
        "the default: chunks 0.3, dense finish, rate 0.002": ("the same, learning rate 0.002"),
    },
}
NAME: Column = ("trained", lambda s: s.first["arm"])
COST: list[Column] = [
    ("seeds", lambda s: str(len(s.rows))),
    ("rows a step", lambda s: str(s.first["batch"])),
    ("steps", lambda s: spread(s.values("steps"), ".0f").partition(" ")[0]),
    ("ms a step", lambda s: spread(s.values("step_ms"), ".0f").partition(" ")[0]),
    ("GiB a row", lambda s: spread(s.values("gib_a_row"), ".1f").partition(" ")[0]),
    ("needed blocks kept", lambda s: spread(s.values("recall"), ".2f").partition(" ")[0]),
]


def table(settings: list[Setting], task: str) -> str:
    """Markdown of settings of one task, row length and time."""
    first = settings[0]
    kinds = [kind for kind in (*LEXICAL_KINDS, *HIDDEN_KINDS) if kind in first.kinds]
    columns = [NAME, *quality_columns(task, first.lengths, kinds), *COST]
    return _markdown(columns, settings)


def _markdown(columns: list[Column], settings: list[Setting]) -> str:
    """A line a setting; columns that hold nothing are left out."""
    cells = [[make(setting) for _, make in columns] for setting in settings]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    lines = [[columns[i][0] for i in kept], ["---"] * len(kept)]
    lines += [[line[i] for i in kept] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def span_of(setting: Setting) -> str:
    """How long its rows trained."""
    name = setting.first["name"].split(", ")
    return name[-2]


def blocks(settings: list[Setting]) -> dict[tuple[str, int, str], list[Setting]]:
    """Settings that are compared, by task, tokens and time; the base beside all of its task."""
    found: dict[tuple[str, int, str], list[Setting]] = {}
    bases = [s for s in settings if s.first["arm"] == "base"]
    for setting in settings:
        if setting not in bases:
            first = setting.first
            found.setdefault((first["task"], first["tokens"], span_of(setting)), []).append(setting)
    for (task, tokens, _), some in found.items():
        some[:0] = [s for s in bases if (s.first["task"], s.first["tokens"]) == (task, tokens)]
    order = list(TITLES)
    return dict(sorted(found.items(), key=lambda x: (order.index(x[0][0]), x[0][1], x[0][2])))


def where(header: dict) -> str:
    """What was measured on, and with what."""
    names = ("torch", "triton", "transformers", "peft")
    versions = ", ".join(f"{name} {header[name]}" for name in names)
    return f"{header['gpu']}, {versions}, commit `{header['commit']}`, {header['date']}."


def all_tables(header: dict, rows: list[dict]) -> str:
    """Every comparison, and what went wrong."""
    parts = []
    for (task, tokens, span), settings in blocks(settings_of(rows)).items():
        title = f"### {TITLES[task]}: {thousands(str(tokens))}, {span}"
        parts.append(f"{title}\n\n{table(settings, task)}")
    if wrong := [row for row in rows if row["status"] != "ok"]:
        lines = [f"- {row['name']}: {row['status']}" for row in wrong]
        parts.append("### Without a result\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, where(header)])


def headline_table(header: dict, rows: list[dict]) -> str:
    """The arms of `README`, with what matters most."""
    tables: dict[tuple[str, int], list[Setting]] = {}
    shown = [
        row
        for row in rows
        if row["tokens"] == 32768 and row["arm"] in README.get(row["task"], ()) and row["seconds"]
    ]
    for (task, tokens, _), settings in blocks(settings_of(shown)).items():
        tables.setdefault((task, tokens), []).extend(settings)
    parts = []
    for (task, tokens), settings in tables.items():
        order = list(README[task])
        settings.sort(key=lambda setting: order.index(setting.first["arm"]))
        last = str(tokens)
        columns: dict[str, list[Column]] = {
            "text": [
                ("perplexity", figure(".2f", "perplexity")),
                ("values found", answered("value", last)),
                ("nats a quotation token", _nats("quotation", last)),
            ],
            "lexical": [(f"{kind}s", answered(kind, last)) for kind in LEXICAL_KINDS],
        }
        cost = [column for column in COST if column[0] in ("seeds", "steps", "GiB a row")]
        names = README[task]
        name: Column = ("trained", lambda setting, names=names: names[setting.first["arm"]])
        head = [name, ("for", span_of), *columns[task], *cost]
        title = f"**{TITLES[task]}**, rows of {thousands(last)}"
        parts.append(f"{title}\n\n{_markdown(head, settings)}")
    return "\n\n".join([*parts, where(header)])


def short_table(rows: list[dict]) -> str:
    """A line a setting, for a terminal."""
    lines = []
    for (task, tokens, span), settings in blocks(settings_of(rows)).items():
        lines += [f"== {task} {thousands(str(tokens))} {span}", table(settings, task)]
    lines += [f"{row['name']}: {row['status']}" for row in rows if row["status"] != "ok"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON file of results.py")
    print(all_tables(*load(parser.parse_args(argv).results)))


if __name__ == "__main__":
    main()
