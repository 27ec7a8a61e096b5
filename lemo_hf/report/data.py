"""What lies in the directory of a run, for its page."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemo_hf.report.checks import check_history, check_recall, check_record, has_rows
from lemo_hf.storage.checkpoints import weights_in
from lemo_hf.storage.files import CONFIG_NAME, near_path, read_json, read_text

logger = logging.getLogger(__name__)

RECORD_NAME = "lemo_report.json"
STATE_NAME = "trainer_state.json"
# JSON that is no evaluation, or is shown elsewhere.
KNOWN = {
    *(RECORD_NAME, STATE_NAME, CONFIG_NAME, "adapter_config.json", "config.json"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "all_results.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json"),
}
# Columns of the tables in results of `lemo eval`.
POSITION = ("first", "last", "perplexity")
CELL = ("length", "depth", "accuracy", "samples")


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's directory.

    Attributes:
        name: Name of the directory.
        history: Trainer's ``log_history``.
        record: Record of `ReportCallback`; empty if the run had none.
        settings: Text of files, or mappings, by title.
        recall: Rows of the predictor's recall table; empty without a predictor.
        evaluations: JSON results by path; see `evaluations_in`.
        outdated: Paths of results that are older than the weights, and so of others.
    """

    name: str
    history: list[dict[str, Any]]
    record: dict[str, Any]
    settings: dict[str, Any]
    recall: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    outdated: list[str]


def read_run(directory: str | os.PathLike) -> RunFiles:
    """Read what is there.

    Raises:
        OSError: There is no such directory.
        ValueError: It holds no run, or a file of it is damaged.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no directory {os.fspath(directory)!r}{near_path(directory)}"
        )
    states = [folder / STATE_NAME, *reversed(_checkpoints(folder))]
    state = next((path for path in states if path.is_file()), None)
    record = read_record(folder / RECORD_NAME)
    if state is None and not record:
        raise ValueError(
            f"{os.fspath(directory)!r} has neither {STATE_NAME} nor {RECORD_NAME}: give the "
            "output directory of a Trainer."
        )
    lemo = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else None
    predictor = (lemo or {}).get("predictor")
    section = predictor if isinstance(predictor, dict) else {}
    recall = section.get("recall") or []
    check_recall(recall, str(folder / CONFIG_NAME))
    evaluations = dict(evaluations_in(folder))
    outdated = [path for path in evaluations if _is_outdated(folder, path)]
    if outdated:
        logger.warning(
            "%s: %s left out of the page: evaluated before the weights there were written, and so "
            "with others. Evaluate again with lemo eval.",
            *(folder, f"{', '.join(outdated)} {'is' if len(outdated) == 1 else 'are'}"),
        )
    return RunFiles(
        name=folder.resolve().name,
        history=[] if state is None else read_history(state),
        record=record,
        settings=dict(_settings(folder, record, lemo)),
        recall=recall,
        evaluations={k: v for k, v in evaluations.items() if k not in outdated},
        outdated=outdated,
    )


def read_record(path: Path) -> dict[str, Any]:
    """What `ReportCallback` left there; empty if it left nothing.

    Raises:
        ValueError: It is damaged.
    """
    if not path.is_file():
        return {}
    record = read_json(path)
    check_record(record, str(path))
    return record


def read_history(path: Path) -> list[dict[str, Any]]:
    """Trainer's log.

    Raises:
        ValueError: It is damaged.
    """
    history = read_json(path).get("log_history", [])
    check_history(history, str(path))
    return history


def evaluations_in(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of `lemo eval`: JSON objects with numbers in them."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        if path.name in KNOWN or path.parent.name.startswith("checkpoint-"):
            continue
        try:
            values = read_json(path)
        except (OSError, ValueError):  # JSON of somebody else: a list, or not even that
            continue
        if (kind := _kind(values)) is not None:
            yield str(path.relative_to(folder)), {**values, "kind": kind}


def _is_outdated(folder: Path, path: str) -> bool:
    written = max((x.stat().st_mtime_ns for x in weights_in(folder)), default=0)
    return (folder / path).stat().st_mtime_ns < written


def _kind(values: dict[str, Any]) -> str | None:
    if "perplexity" in values and has_rows(values.get("by_position"), *POSITION):
        return "perplexity"
    if "accuracy" in values and has_rows(values.get("cells"), *CELL):
        return "retrieval"
    if "eval_loss" in values or "train_loss" in values:  # Trainer's own, which trackers show
        return None
    scores = [x for value in values.values() for x in (_leaves(value))]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in scores)
    return "longbench" if scores and numbers else None


def _leaves(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _checkpoints(folder: Path) -> list[Path]:
    """States of the checkpoints, the newest last."""
    found = [path for path in folder.glob(f"checkpoint-*/{STATE_NAME}")]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _settings(folder: Path, record: dict, lemo: dict | None) -> Iterator[tuple[str, Any]]:
    asked = folder / "lemo_train.yaml"
    if asked.is_file():
        yield asked.name, read_text(asked)
    if lemo := record.get("lemo") or lemo:
        simple = {k: v for k, v in lemo.items() if not isinstance(v, dict) and v is not None}
        yield "LeMoConfig", simple
    if (folder / "adapter_config.json").is_file():
        adapter = read_json(folder / "adapter_config.json")
        yield "adapter", {k: v for k, v in adapter.items() if v not in (None, {}, [], False)}
