"""Files of a LongBench run: its settings, and predictions, which are only appended."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lemo_hf.eval.longbench_score import SETTINGS_NAME, read_settings
from lemo_hf.shown import shortened, shown
from lemo_hf.storage.files import parse_json, whole_file, write_json


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Reserve ``folder`` for runs with these ``settings``, which are written to its
    ``settings.json``.

    Raises:
        ValueError: The folder holds results of other or unknown settings.
    """
    path = folder / SETTINGS_NAME
    settings = json.loads(json.dumps(settings, default=str))  # as they will be read
    if path.is_file():
        there = read_settings(path)["settings"]
        wrong = [
            f"{shortened(name)} was {shown(there.get(name))} and is {shown(settings.get(name))}"
            for name in {**settings, **there}
            if there.get(name) != settings.get(name)
        ]
        if wrong:
            differences = shortened(", ".join(wrong), 2000)
            raise ValueError(
                f"{folder} holds results of other settings: {differences}. Give another folder, or "
                "remove this one."
            )
        return
    if any(folder.glob("*.jsonl")):
        raise ValueError(
            f"{folder} has predictions but no {SETTINGS_NAME}, so their settings are not known. "
            "Give another folder, or score these with score_folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, {"settings": settings, "rows": {}})


def resume(path: Path, rows: Sequence[dict[str, Any]], batch_size: int) -> int:
    """Number of rows whose predictions ``path`` has. What an interruption left of the next ones is
    cut off.

    A batch that is there in part is cut off too: its rows are answered together again.

    Args:
        path: File ``{task}.jsonl``, in a folder that was claimed.
        rows: All rows that are to be answered.
        batch_size: Number of rows that are answered together.

    Raises:
        ValueError: The file has a broken line, or its predictions are not of these rows.
    """
    _expect(path, len(rows))
    if not path.exists():
        return 0
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline was torn
    again = f"Remove {path} to answer all its rows again."
    if len(lines) > len(rows):
        raise ValueError(f"there are {len(lines)} predictions of {len(rows)} rows. {again}")
    for number, (line, row) in enumerate(zip(lines, rows, strict=False), 1):
        try:
            same = parse_json(line)["answers"] == row["answers"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is no prediction: {shown(error)}. {again}") from error
        if not same:
            raise ValueError(f"line {number} has other answers than the data. {again}")
    done = len(lines) if len(lines) == len(rows) else len(lines) // batch_size * batch_size
    with path.open("rb+") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:done]))
    return done


def append(path: Path, rows: Sequence[dict[str, Any]], predictions: Sequence[str]) -> None:
    """Add ``predictions`` of ``rows`` in the benchmark's format, and flush them."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        for row, prediction in zip(rows, predictions, strict=True):
            line = {"pred": prediction}
            line |= {name: row[name] for name in ("answers", "all_classes", "length")}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _expect(path: Path, rows: int) -> None:
    """Write down how many rows there will be, so that a score of fewer is recognised."""
    settings = path.parent / SETTINGS_NAME
    values = read_settings(settings)
    if values["rows"].get(path.stem) != rows:
        values["rows"][path.stem] = rows
        _write(settings, values)


def _write(path: Path, values: dict[str, Any]) -> None:
    with whole_file(path) as written:
        write_json(written, values)
