"""Scores of LongBench predictions, to the benchmark's own two decimals."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lemo_hf.eval.longbench_load import MOST_BYTES, check_fields
from lemo_hf.eval.longbench_metrics import METRICS
from lemo_hf.eval.longbench_tasks import TASKS, choose_tasks
from lemo_hf.storage.files import read_json, whole_file
from lemo_hf.storage.json_lines import read_file

logger = logging.getLogger(__name__)

RESULT_NAME, SETTINGS_NAME = "result.json", "settings.json"
# LongBench-E: rows by their length (words, or Chinese characters) below a number.
BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}
# Metrics whose time is the product of two lengths, and that of letters which takes a minute.
SLOW = {"rouge", "rouge_zh", "code_sim"}
MOST_PAIRS = 2**29


def score_row(
    task: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """Score of one prediction: the best over its answers, 0 to 1.

    Args:
        task: Name of the task, one of `TASKS`.
        prediction: Text that the model wrote.
        answers: Texts that would each be right.
        all_classes: Names of the classes, where the task has some.

    Raises:
        ImportError: The task is Chinese and jieba is not installed.
        ValueError: The task's metric does not fit the answers or classes, or it would take hours.
    """
    kind = TASKS[task]
    pairs = len(prediction) * sum(map(len, answers))
    if kind.metric in SLOW and pairs > MOST_PAIRS:
        raise ValueError(
            f"{len(prediction):,} letters of prediction and {sum(map(len, answers)):,} of answers "
            f"are more than {kind.metric} can compare: shorten the prediction."
        )
    if kind.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    extra = (all_classes,) if kind.metric == "classification" else ()
    return max((METRICS[kind.metric](prediction, x, *extra) for x in answers), default=0.0)


def score_rows(
    task: str, rows: Sequence[dict[str, Any]], *, extended: bool = False
) -> float | dict[str, float]:
    """Score of a task: the mean over its rows, in percent with two decimals.

    Args:
        task: Name of the task, one of `TASKS`.
        rows: Mappings with ``pred``, ``answers`` and ``all_classes``, as in the benchmark's own
            files.
        extended: Whether to score each of LongBench-E's `BUCKETS`, by the rows' ``length``; NaN for
            a bucket without rows.

    Raises:
        ImportError: The task is Chinese and jieba is not installed.
        ValueError: There is no such task, no row, or a row lacks a field.
    """
    choose_tasks([task], extended=extended)
    fields: dict[str, Any] = {"pred": str, "answers": list, "all_classes": list | None}
    fields |= {"length": int} if extended else {}
    if not rows:
        raise ValueError(f"there is no prediction of {task} to score.")
    for number, row in enumerate(rows, 1):
        check_fields(row, fields, f"{task}, row {number}")
    # The benchmark's scorer takes the last row's classes for all rows; they are the same.
    classes = rows[-1]["all_classes"]
    scores = [
        _score_line(task, number, row["pred"], row["answers"], classes)
        for number, row in enumerate(rows, 1)
    ]
    if not extended:
        total = 0.0
        for score in scores:  # from Python 3.12 on sum rounds otherwise
            total += score
        return round(100 * total / len(scores), 2)
    buckets: dict[str, list[float]] = {name: [] for name in BUCKETS}
    for row, score in zip(rows, scores, strict=True):
        buckets[next(name for name, end in BUCKETS.items() if row["length"] < end)].append(score)
    # numpy adds up in another order than sum, which the last decimal can show.
    return {
        name: round(float(100 * np.mean(scores)), 2) if scores else float("nan")
        for name, scores in buckets.items()
    }


def check_rows(task: str, rows: Sequence[dict[str, Any]]) -> None:
    """Check that predictions of these rows can be scored, before hours of work.

    Raises:
        ImportError: The task is Chinese and jieba is not installed.
        ValueError: Answers or classes of a row do not fit the task's metric.
    """
    for number, row in enumerate(rows, 1):
        _score_line(task, number, "", row["answers"], rows[-1]["all_classes"])


def _score_line(task: str, number: int, prediction: str, answers: Any, classes: Any) -> float:
    try:
        return score_row(task, prediction, answers, classes)
    except ValueError as error:
        raise ValueError(f"{task}, row {number}: {error}") from error


def score_folder(folder: str | os.PathLike, *, extended: bool = False) -> dict[str, Any]:
    """`score_predictions`, written to ``result.json`` in the folder."""
    scores = score_predictions(folder, extended=extended)
    write_scores(folder, scores)
    return scores


def write_scores(folder: str | os.PathLike, scores: dict[str, Any]) -> None:
    """Write ``result.json`` as the benchmark does."""
    with (
        whole_file(Path(folder, RESULT_NAME)) as written,
        open(written, "w", encoding="utf-8") as file,
    ):
        json.dump(scores, file, ensure_ascii=False, indent=4)


def score_predictions(folder: str | os.PathLike, *, extended: bool = False) -> dict[str, Any]:
    """Score the predictions in a folder, and change nothing there.

    Args:
        folder: Folder with ``{task}.jsonl`` for each task that was run, in the benchmark's own
            format: ``pred``, ``answers``, ``all_classes`` and ``length`` a line. Made by
            `run_longbench`, by the benchmark's pred.py or by anything else.
        extended: Whether they are LongBench-E's, whose files have the same names.

    Returns:
        The content of ``result.json``: the score by task, or by task and bucket; NaN for a bucket
        without rows, as the benchmark writes it.

    Raises:
        ImportError: There is a Chinese task and jieba is not installed.
        OSError: There is no such folder.
        ValueError: The folder has no predictions, a file's name or a row is wrong, or there are
            more rows than a run was asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(folder)!r}.")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.jsonl")):
        task = path.name.split(".")[0]
        if task in files:
            raise ValueError(f"{files[task].name} and {path.name} are both of {task}: remove one.")
        files[task] = path
    if not files:
        raise ValueError(f"{os.fspath(folder)!r} has no predictions, files named {{task}}.jsonl.")
    scores = {}
    for chosen in choose_tasks(list(files), extended=extended):
        rows = list(read_file(files[chosen.name], MOST_BYTES))
        _compare_with_asked(folder, files[chosen.name], len(rows))
        scores[chosen.name] = score_rows(chosen.name, rows, extended=extended)
    return scores


def _compare_with_asked(folder: Path, path: Path, rows: int) -> None:
    """Compare with the rows that `run_longbench` was asked for: fewer are a warning, more an
    error."""
    if not (folder / SETTINGS_NAME).is_file():
        return
    task = path.name.split(".")[0]
    wanted = read_settings(folder / SETTINGS_NAME)["rows"].get(task, rows)
    if rows < wanted:
        logger.warning("%s is unfinished: %d of %d rows are scored.", task, rows, wanted)
    if rows > wanted:
        raise ValueError(
            f"{path} has {rows} predictions of {wanted} rows: several runs wrote to it. Remove it "
            "and answer its rows again."
        )


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """What `run_longbench` wrote: its ``settings``, and the number of ``rows`` of each task.

    Raises:
        ValueError: The file is damaged.
    """
    values = read_json(path)
    found = {name: values.get(name, {}) for name in ("settings", "rows")}
    whole = all(isinstance(part, dict) for part in found.values())
    if not whole or not all(type(rows) is int for rows in found["rows"].values()):
        raise ValueError(f"{path} holds no settings of a run: give another folder, or remove it.")
    return found
