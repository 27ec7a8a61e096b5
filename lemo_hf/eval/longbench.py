"""LongBench and LongBench-E: predictions, which can be resumed and run on several GPUs, and
scores."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm.auto import tqdm

from lemo_hf.eval.generation import continue_greedily
from lemo_hf.eval.longbench_files import append, claim_folder, resume
from lemo_hf.eval.longbench_load import load_task
from lemo_hf.eval.longbench_metrics import CHINESE_METRICS, load_jieba
from lemo_hf.eval.longbench_prompt import context_of, prompt_tokens, room
from lemo_hf.eval.longbench_score import check_rows, score_folder
from lemo_hf.eval.longbench_tasks import Task, choose_tasks
from lemo_hf.eval.weights import adapter_scaling, weights_checksum
from lemo_hf.modes import evaluating
from lemo_hf.patch import transformers_model
from lemo_hf.storage.outputs import only_run

logger = logging.getLogger(__name__)


def run_longbench(
    model: nn.Module,
    tokenizer: Any,
    output_dir: str | os.PathLike,
    tasks: Sequence[str] | None = None,
    *,
    data: str | os.PathLike | None = None,
    revision: str | None = None,
    extended: bool = False,
    max_length: int | None = None,
    batch_size: int = 1,
    chat_template: bool = True,
    max_rows: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Let a model answer LongBench's rows, and score what it wrote.

    Predictions are written batch by batch, in the data's order and the benchmark's own format, to
    ``{output_dir}/{task}.jsonl``. An interrupted run continues where it stopped when it is called
    again, with the same result: batches have the same rows. With accelerate or torchrun all
    processes call this function, and each takes its share of the batches.

    Args:
        model: Causal LM or a PEFT model around one, on its device.
        tokenizer: Tokenizer of the model.
        output_dir: Directory for predictions, ``settings.json`` and ``result.json``; made if
            missing. It holds runs of one model with one set of settings, task by task if wanted.
        tasks: Names of tasks; None: all, 21 or LongBench-E's 13.
        data: Folder or zip, see `load_task`; None: the Hub's.
        revision: Branch, tag or commit of the Hub's data.
        extended: Whether to run LongBench-E.
        max_length: Greatest number of tokens of a prompt; the middle of a longer one is left out.
            The answer and a chat template come on top. None: what the model's context has room for,
            task by task: ``max_position_embeddings`` less the task's new tokens, those of the chat
            template, and 16 for the cut. The benchmark's own runs had 3,500 for a context of 4k and
            31,500 for 32k.
        batch_size: Number of prompts that a process continues at a time, padded to the longest.
        chat_template: Whether to put prompts into the tokenizer's chat template, if it has one,
            except for the six tasks for which the benchmark does not.
        max_rows: Number of first rows of each task to answer; None: all.
        progress: Whether a progress bar is shown, on the first process.

    Returns:
        Scores by task, see `score_folder`, of all tasks in ``output_dir``; on every process.

    Raises:
        ImportError: There is a Chinese task and jieba is not installed.
        OSError: The data are not there or cannot be reached.
        ValueError: A setting or a row of the data is wrong, ``output_dir`` holds results of other
            settings, or another run writes there.
    """
    chosen = choose_tasks(tasks, extended=extended)
    for name, value, least in (
        ("max_length", max_length, 2),
        ("batch_size", batch_size, 1),
        ("max_rows", max_rows, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    lengths = {
        task.name: _prompt_length(task, model, tokenizer, max_length, chat_template)
        for task in chosen
    }
    if any(task.metric in CHINESE_METRICS for task in chosen):
        load_jieba()  # rather now than after hours of generation
    state, folder = PartialState(), Path(output_dir)
    settings = {
        **_identity(model, tokenizer, chat_template),
        "extended": extended,
        "max_length": max_length,
        "max_rows": max_rows,
    }

    def rows_of(task: Task) -> list[dict[str, Any]]:
        return load_task(task.name, data, extended=extended, revision=revision)[:max_rows]

    def check() -> int:
        total = 0
        for task in chosen:
            rows = rows_of(task)
            check_rows(task.name, rows)
            total += len(rows)
        return total

    total = _first_process(check)
    hidden = not (progress and state.is_main_process)
    with (
        ExitStack() as held,
        evaluating(model),
        tqdm(total=total, desc="LongBench", unit="row", disable=hidden) as bar,
    ):
        # What a context manager gives is None, which can be sent to the other processes.
        _first_process(lambda: held.enter_context(only_run(folder)))
        _first_process(lambda: claim_folder(folder, settings))
        for task in chosen:
            with state.main_process_first():  # it downloads, the others find the file
                rows = rows_of(task)
            answer = _Answer(model, tokenizer, task, lengths[task.name], chat_template)
            bar.set_postfix(task=task.name)
            _predict(rows, folder / f"{task.name}.jsonl", answer, batch_size, bar)
        return _first_process(lambda: score_folder(folder, extended=extended))


@dataclass(frozen=True)
class _Answer:
    """Answers rows of one task."""

    model: nn.Module
    tokenizer: Any
    task: Task
    max_length: int
    chat_template: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        settings = (self.tokenizer, self.max_length, self.chat_template)
        prompts = [prompt_tokens(self.task, row, *settings) for row in rows]
        stops: dict[str, Any] = {}
        if self.task.stops_at_newline:
            newline = self.tokenizer.encode("\n", add_special_tokens=False)[-1]
            stops = {"min_new_tokens": 1, "stop_tokens": [newline]}
        length = self.task.max_new_tokens
        return continue_greedily(self.model, self.tokenizer, prompts, length, **stops)


def _predict(
    rows: Sequence[dict[str, Any]], path: Path, answer: _Answer, batch_size: int, bar: tqdm
) -> None:
    """Append the predictions that ``path`` lacks, one batch of each process at a time."""
    state = PartialState()
    done = _first_process(lambda: resume(path, rows, batch_size))
    bar.total -= done  # of an earlier run; they say nothing of the time that the others take
    bar.refresh()
    for start in range(done, len(rows), batch_size * state.num_processes):
        first = start + state.process_index * batch_size
        # In the order of the processes, which is that of the rows; the last may have none.
        predictions = gather_object(answer(rows[first : first + batch_size]))
        if state.is_main_process:
            append(path, rows[start : start + len(predictions)], predictions)
        bar.update(len(predictions))


def _first_process(work: Callable[[], Any]) -> Any:
    """Run ``work`` on the first process. All processes get its result, or raise its error."""
    outcome: list[Any] = [None, None]  # what came of it, or what was raised
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except (ImportError, OSError, ValueError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _prompt_length(
    task: Task, model: nn.Module, tokenizer: Any, max_length: int | None, chat_template: bool
) -> int:
    fits = room(task, model, tokenizer, chat_template)
    if max_length is None:
        if fits is None:
            raise ValueError("the model's config has no max_position_embeddings: give max_length.")
        if fits < 2:
            raise ValueError(
                f"the model's context of {context_of(model)} tokens has no room for a prompt: "
                f"{task.name} generates {task.max_new_tokens}. Give max_length."
            )
        return fits
    if fits is not None and max_length > fits and PartialState().is_main_process:
        logger.warning(
            "%s: prompts of %d tokens and %d generated ones may exceed the model's context of %d.",
            task.name,
            max_length,
            task.max_new_tokens,
            context_of(model),
        )
    return max_length


def _identity(model: nn.Module, tokenizer: Any, chat_template: bool) -> dict[str, Any]:
    """Further facts that decide the predictions, since two states of one training have the same
    name."""
    config = transformers_model(model).config
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    template = getattr(tokenizer, "chat_template", None) if chat_template else None
    return {
        "model": config._name_or_path,
        "weights": weights_checksum(model),
        "scaling": adapter_scaling(model),
        "rope": rope,
        "context": context_of(model),
        "tokenizer": tokenizer.name_or_path,
        "chat_template": template and hashlib.sha256(str(template).encode()).hexdigest()[:16],
    }
