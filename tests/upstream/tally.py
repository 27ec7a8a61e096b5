"""The tally of `compare.py`: which tests end otherwise than with the stock trainer."""

import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

SUITES = ("transformers", "trl", "trl-dpo")
FLOOR = 1e-3  # of what a difference is relative to: noise in a loss of nearly 0 is none


def tally(output: Path, modes: Sequence[str]) -> dict[str, Any]:
    """What the records in ``output`` say; a suite or a mode that has not run is left out."""
    versions = {name: version(name) for name in ("transformers", "trl", "torch")}
    suites = {}
    for suite in SUITES:
        records = {mode: _read(output / f"{suite}-{mode}.jsonl") for mode in modes}
        stock = records.pop("stock")
        if not stock:
            continue
        suites[suite] = {
            "stock": Counter(record["outcome"] for record in stock.values()),
            "modes": {m: compared(stock, ours, m) for m, ours in records.items() if ours},
        }
    return {"versions": versions, "suites": suites}


def compared(stock: dict[str, Any], ours: dict[str, Any], mode: str) -> dict[str, Any]:
    """One mode against stock.

    Returns:
        ``differ``: tests that end otherwise. ``same``: how many do not, by the stock outcome.
        ``lemo``: passing tests with a sparse training. ``refused``: reasons, and in how many tests.
        ``trainings``: how many were compared, how many have the same figures to the bit, how many
        left tokens out, and the largest relative difference of the first loss and of any figure.
    """
    same, refused = Counter(), Counter()
    differ, equal, sparse, differences, all_differences = [], 0, 0, [], []
    for test, record in stock.items():
        other = ours.get(test, {"outcome": "missing", "message": "", "trainings": []})
        refused.update(set(other.get("refused", ())))
        if other["outcome"] == record["outcome"]:
            same[record["outcome"]] += 1
        else:
            pair = {"stock": record["outcome"], "ours": other["outcome"]}
            message = other["message"] or record["message"]
            differ.append({"test": test, **pair, "message": message})
        nothing = {"lemo": True, "figures": []}
        for theirs, mine in zip_longest(record["trainings"], other["trainings"], fillvalue=nothing):
            if mine["lemo"] or mode == "none":
                equal += theirs["figures"] == mine["figures"]
                sparse += (mine.get("kept") or 1) < 1
                each = _differences(theirs["figures"], mine["figures"])
                differences.append((each[0], test))
                all_differences.append(max(each))
    largest = max((difference for difference, _ in differences), default=0.0)
    return {
        "differ": differ,
        "same": same,
        "lemo": sum(any(t["lemo"] for t in record["trainings"]) for record in ours.values()),
        "refused": refused,
        "trainings": {
            "compared": len(differences),
            "equal": equal,
            "sparse": sparse,
            "largest": largest,
            "largest_of_all": max(all_differences, default=0.0),
            "largest_in": [test for found, test in differences if found == largest > 0],
        },
    }


def write_tally(output: Path, result: dict[str, Any]) -> None:
    """``tally.json`` and ``tally.md`` in ``output``."""
    (output / "tally.json").write_text(json.dumps(result, indent=1) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [f"With {versions}.", "", "| suite | class | passes in stock | ends the same |"]
    lines[-1] += " tests with a sparse training |"
    lines[-1] += " trainings that left tokens out | trainings equal to the bit |"
    lines[-1] += " largest difference of a first loss | of any figure |"
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for suite, found in result["suites"].items():
        passes = found["stock"]["passed"]
        for mode, compared in found["modes"].items():
            trainings = compared["trainings"]
            cells = [
                suite,
                "`None`" if mode == "none" else f"retention {mode}",
                str(passes),
                f"{compared['same']['passed']} of {passes}",
                str(compared["lemo"]),
                str(trainings["sparse"]),
                f"{trainings['equal']} of {trainings['compared']}",
                f"{trainings['largest']:.1e}",
                f"{trainings['largest_of_all']:.1e}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| differs | class | stock | ours | message |", "| --- | --- | --- | --- | --- |"]
    for found in result["suites"].values():
        for mode, compared in found["modes"].items():
            for test in compared["differ"]:
                message = " ".join(test["message"].split())[:160].replace("|", "\\|")
                cells = [f"`{test['test']}`", mode, test["stock"], test["ours"], message]
                lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| refused, so run without LeMo | class | tests |", "| --- | --- | --- |"]
    for found in result["suites"].values():
        for mode, compared in found["modes"].items():
            reasons = Counter()
            for reason, tests in compared["refused"].items():
                reasons[reason.partition(": ")[0]] += tests
            lines += [f"| {reason} | {mode} | {tests} |" for reason, tests in reasons.most_common()]
    (output / "tally.md").write_text("\n".join(lines) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record.pop("test"): record for record in records}


def _differences(theirs: Sequence[float | None], ours: Sequence[float | None]) -> list[float]:
    """Of each figure, relative; infinite where the figures are not of one kind.

    What comes after the first losses depends on them, and in tests with a high learning rate
    wildly.
    """
    if len(theirs) != len(ours):
        return [float("inf")]
    return [_difference(*pair) for pair in zip(theirs, ours, strict=True)]


def _difference(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return abs(one - other) / max(abs(one), abs(other), FLOOR)
