"""Rows of the quality benchmark, and rows of several seeds as one setting."""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import load, save

RESULTS = "results.jsonl"
HEADER = ("gpu", "torch", "triton", "transformers", "peft", "date", "commit")


def read_rows(paths: Iterable[Path]) -> list[dict]:
    """Rows of run.py's folders; the latest of each name that ended well, or else the latest."""
    rows: dict[str, dict] = {}
    for path in paths:
        if not (path / RESULTS).exists():
            continue
        for line in (path / RESULTS).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["status"] == "ok" or rows.get(row["name"], row)["status"] != "ok":
                rows[row["name"]] = row
    return list(rows.values())


@dataclass(frozen=True)
class Setting:
    """Rows that differ in their seed alone.

    Attributes:
        rows: One a seed.
    """

    rows: list[dict]

    @property
    def first(self) -> dict:
        """The row of the first seed."""
        return self.rows[0]

    @property
    def lengths(self) -> list[str]:
        """Of the rows that were asked."""
        return list(self.first["asked"])

    @property
    def kinds(self) -> list[str]:
        """Of the questions, as the longest rows ask them."""
        return sorted(self.first["asked"][self.lengths[-1]])

    def values(self, *path: str) -> list[float]:
        """A figure of each seed; empty where it was not measured."""
        found = [_at(row, path) for row in self.rows]
        return [x for x in found if x is not None]

    def mean(self, *path: str) -> float | None:
        """Over seeds."""
        found = self.values(*path)
        return sum(found) / len(found) if found else None

    def answered(self, kind: str | None, length: str) -> list[float]:
        """Share answered exactly, a seed each; ``kind`` None: the mean of all kinds."""
        kinds = self.kinds if kind is None else [kind]
        return [
            sum(row["asked"][length][k]["exact"] for k in kinds) / len(kinds) for row in self.rows
        ]


def settings_of(rows: Iterable[dict]) -> list[Setting]:
    """Rows that ended well, seeds together, in the order in which settings first came."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault(row["name"].rpartition(", seed")[0], []).append(row)
    return [Setting(sorted(some, key=lambda row: row["seed"])) for some in found.values()]


def _at(row: dict, path: tuple[str, ...]) -> float | None:
    for name in path:
        if name not in row:
            return None
        row = row[name]
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rows of run.py's folders as one JSON.")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="results/<gpu>/quality.json")
    args = parser.parse_args(argv)
    rows = read_rows(args.folders)
    header = {name: " / ".join(sorted({row[name] for row in rows})) for name in HEADER}
    if args.output.exists():
        fresh = {row["name"] for row in rows}
        rows = [row for row in load(args.output)[1] if row["name"] not in fresh] + rows
        header = {name: " / ".join(sorted({row[name] for row in rows})) for name in HEADER}
    save(args.output, header, rows)
    print(f"{args.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
