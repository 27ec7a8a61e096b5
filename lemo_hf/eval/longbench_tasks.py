"""LongBench's 21 tasks: their generation, their metrics, and the benchmark's own prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lemo_hf.shown import nearest

# Prompts and lengths are LongBench's configuration, word for word (MIT, see LICENSE there).
DATA = Path(__file__).parent / "longbench_data"

_METRICS = {
    "narrativeqa": "qa_f1",
    "qasper": "qa_f1",
    "multifieldqa_en": "qa_f1",
    "multifieldqa_zh": "qa_f1_zh",
    "hotpotqa": "qa_f1",
    "2wikimqa": "qa_f1",
    "musique": "qa_f1",
    "dureader": "rouge_zh",
    "gov_report": "rouge",
    "qmsum": "rouge",
    "multi_news": "rouge",
    "vcsum": "rouge_zh",
    "trec": "classification",
    "triviaqa": "qa_f1",
    "samsum": "rouge",
    "lsht": "classification",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval_zh",
    "lcc": "code_sim",
    "repobench-p": "code_sim",
}
_CHINESE = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
_CODE = {"lcc", "repobench-p"}
# Few-shot examples and code set the form of the answer: a chat template would break it.
_PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
_FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
_EXTENDED = {
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
}


@dataclass(frozen=True)
class Task:
    """One task of LongBench.

    Attributes:
        name: Name in the benchmark.
        metric: Key of `lemo_hf.eval.longbench_metrics.METRICS`.
        prompt: Template with ``{context}``, and ``{input}`` if the task asks something.
        max_new_tokens: Greatest number of tokens to generate.
        language: Language, ``"en"``, ``"zh"`` or ``"code"``.
        chat_template: Whether a chat model gets the prompt in its chat template.
        first_line: Whether only the prediction's first line is scored.
        stops_at_newline: Whether generation ends at a newline, after at least one token.
        extended: Whether the task is part of LongBench-E.
    """

    name: str
    metric: str
    prompt: str
    max_new_tokens: int
    language: str
    chat_template: bool
    first_line: bool
    stops_at_newline: bool
    extended: bool


def _read(name: str) -> dict:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def _tasks() -> dict[str, Task]:
    prompts, lengths = _read("dataset2prompt.json"), _read("dataset2maxlen.json")
    return {
        name: Task(
            name=name,
            metric=metric,
            prompt=prompts[name],
            max_new_tokens=lengths[name],
            language="zh" if name in _CHINESE else "code" if name in _CODE else "en",
            chat_template=name not in _PLAIN,
            first_line=name in _FIRST_LINE,
            stops_at_newline=name == "samsum",
            extended=name in _EXTENDED,
        )
        for name, metric in _METRICS.items()
    }


TASKS: dict[str, Task] = _tasks()


def choose_tasks(names: Sequence[str] | None = None, *, extended: bool = False) -> list[Task]:
    """Tasks by their names, in the benchmark's order.

    Args:
        names: Names of `TASKS`; None: all.
        extended: Whether to choose among LongBench-E's tasks only.

    Raises:
        ValueError: A name is unknown, or not of LongBench-E; the message lists the known names.
    """
    known = {name: task for name, task in TASKS.items() if task.extended or not extended}
    benchmark = "LongBench-E" if extended else "LongBench"
    names = [names] if isinstance(names, str) else names
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"{benchmark} has no task {name!r}, its tasks are: {', '.join(known)}"
                f"{nearest(name, known)}"
            )
    if names is not None and not names:
        raise ValueError(f"no task was named: leave tasks out for all {len(known)}.")
    return [task for name, task in known.items() if names is None or name in names]
