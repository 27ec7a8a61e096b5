"""Rows of the benchmark's JSON as settings: seeds together, beside dense, with what they cost."""

from dataclasses import dataclass

# Kinds that are measured for their quality alone: what they would save, they do not.
NO_COST = ("nested", "subset-gradient")
COMPLETION = "completion, "


@dataclass(frozen=True)
class Setting:
    """Rows that differ in their seed alone.

    Attributes:
        name: Of the setting.
        rows: One a seed.
        dense: The dense row of the same seed for each of them, or of the first seed; None where
            there is none.
        timing: The setting's own row alone on a GPU, or None.
    """

    name: str
    rows: list[dict]
    dense: list[dict | None]
    timing: dict | None

    @property
    def is_dense(self) -> bool:
        """It is what others are compared with."""
        return self.name.removeprefix(COMPLETION) == "dense"

    @property
    def step_ms(self) -> float | None:
        """Median ms of a step alone on a GPU."""
        return self.timing and self.timing["step_ms"]

    @property
    def peak_gib(self) -> float | None:
        """Most memory allocated in training; None if that says nothing about the setting."""
        if self.rows[0]["kind"] in NO_COST:
            return None
        return (self.timing or self.rows[0]).get("peak_gib")

    def mean(self, *path: str) -> float:
        """Of a number in the rows, over seeds."""
        values = [_at(row, path) for row in self.rows]
        return sum(values) / len(values)

    def changes(self, *path: str) -> list[float]:
        """Of a number against dense, as shares of it, a seed each; empty without a dense row."""
        pairs = zip(self.rows, self.dense, strict=True)
        return [_at(row, path) / _at(dense, path) - 1 for row, dense in pairs if dense is not None]


def settings_of(rows: list[dict], group: str) -> list[Setting]:
    """The evaluated settings of a group: dense first, then the best on the first kind of text."""
    done = [row for row in rows if row["status"] == "ok"]
    timings = {row["setting"]: row for row in done if not row["evaluate"]}
    evaluated = [row for row in done if row["evaluate"]]
    dense = {(row["name"].split(", seed")[0], row["seed"]): row for row in evaluated}
    by_name: dict[str, list[dict]] = {}
    for row in evaluated:
        if group in row["groups"]:
            by_name.setdefault(row["setting"], []).append(row)
    found = []
    for name, some in by_name.items():
        some = sorted(some, key=lambda row: row["seed"])
        base = COMPLETION * name.startswith(COMPLETION) + "dense"
        beside = [dense.get((base, row["seed"]), dense.get((base, 0))) for row in some]
        timing = None if some[0]["kind"] in NO_COST else timings.get(name)
        found.append(Setting(name, some, beside, timing))
    text = next(iter(evaluated[0]["perplexity"])) if evaluated else ""
    return sorted(found, key=lambda s: (not s.is_dense, s.mean("perplexity", text)))


def _at(row: dict, path: tuple[str, ...]) -> float:
    for name in path:
        row = row[name]
    return row
