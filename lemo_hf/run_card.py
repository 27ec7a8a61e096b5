"""The model card of a run: a section on what trained, and how, in the card that others write."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from yaml import YAMLError

from lemo_hf.cards import PAPER, is_repository, plain, table
from lemo_hf.config import LeMoConfig
from lemo_hf.schedule import last_steps
from lemo_hf.storage.files import CONFIG_NAME, read_text, whole_file

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
TAGS = ("lemo-hf", "lemo")
_BEGINS, _ENDS = "<!-- lemo-hf: what trained -->", "<!-- lemo-hf: end -->"
_BEGUN_BY_OTHERS = (
    "<!-- This model card has been generated automatically",  # Trainer
    "It has been trained using [TRL]",
)
_UNFILLED = "# Model Card for Model ID\n"  # PEFT's, as it comes from the Hub's template
_LINKED = (  # what may lie beside the card
    ("report.html", "the page of the run"),
    (CONFIG_NAME, "LeMo's settings"),
    ("lemo_train.yaml", "all settings, for `lemo train --config`"),
)


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that its trainer knows.

    Attributes:
        config: The user's settings.
        described: What `LeMo.describe` says of them.
        base: Name of the model that was trained, or None.
        state: State of the Trainer, with its log.
        rows: Number of rows of an optimizer step.
        processes: Number of processes that have rows of their own.
    """

    config: LeMoConfig
    described: str
    base: str | None
    state: TrainerState
    rows: int
    processes: int


def is_ours(folder: str | os.PathLike) -> bool:
    """Whether the card there has the section."""
    path = Path(folder, CARD_NAME)
    return path.is_file() and _BEGINS in read_text(path)


def is_run_card(path: Path) -> bool:
    """Whether a file is a card of a run: with our section, or as Trainer or TRL begins it."""
    text = path.read_bytes().decode("utf-8", "replace")
    return any(sign in text for sign in (_BEGINS, *_BEGUN_BY_OTHERS))


def keeps_users_card(folder: str | os.PathLike) -> bool:
    """Whether the card there is the user's, which a trainer may not replace; a warning says so.

    It is not the user's if it is of Trainer or TRL, PEFT's template that nobody has filled in, or
    if it has no more than our section below the title that `add_run` gives it.
    """
    path = Path(folder, CARD_NAME)
    if not path.is_file():
        return False
    text = path.read_bytes().decode("utf-8", "replace")
    own = re.sub(r"\A---\n.*?\n---\n", "", _without_section(text), flags=re.DOTALL).strip()
    of_trainers = any(sign in text for sign in (*_BEGUN_BY_OTHERS, _UNFILLED))
    if of_trainers or own in ("", _title(folder)):
        return False
    _warn_once(path)
    return True


@cache  # TRL makes a card with each checkpoint
def _warn_once(path: Path) -> None:
    logger.warning(
        "%s is the user's: it stays, and only gets a section on what trained. Remove the file, or "
        "rename it, for the card that create_model_card and push_to_hub would write.",
        path,
    )


def _title(folder: str | os.PathLike) -> str:
    return f"# {plain(Path(folder).resolve().name)}"


def add_run(folder: str | os.PathLike, facts: RunFacts) -> None:
    """Write the section into the card in ``folder``, which is made if there is none.

    A section of an earlier save is replaced; all other text stays. The metadata get our tags, the
    library and the base model if they lack them. A base model that is no repository, such as a
    directory of this machine, is left out: the Hub refuses it. What lies there and is no card is
    left alone, and a warning says so.
    """
    path = Path(folder, CARD_NAME)
    try:
        text = read_text(path) if path.is_file() else f"{_title(folder)}\n"
        card = _with_run(text, Path(folder), facts)
        with whole_file(path) as part:
            Path(part).write_text(card, encoding="utf-8")
    except (OSError, ValueError, YAMLError) as error:
        logger.warning("%s is left without what trained: %s", path, error)


def _with_run(text: str, folder: Path, facts: RunFacts) -> str:
    from huggingface_hub import ModelCard

    metadata = "" if text.startswith("---\n") else "---\n{}\n---\n"
    card = ModelCard(metadata + text, ignore_metadata_errors=True)
    data: Any = card.data
    data.tags = [*dict.fromkeys([*(data.tags or []), *TAGS])]
    data.library_name = data.library_name or "transformers"
    named = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    known = [name for name in [*filter(None, named)] or [facts.base] if is_repository(name)]
    data.base_model = known if len(known) > 1 else (known or [None])[0]
    card.text = _with_section(card.text, _section(folder, facts))
    return str(card)


def _with_section(text: str, section: str) -> str:
    """The section before the first heading below the title, or at the end."""
    text = _without_section(text)
    first = re.search("^## ", text, re.MULTILINE)
    at = len(text) if first is None else first.start()
    return f"{text[:at].rstrip()}\n\n{section}\n\n{text[at:]}".strip("\n") + "\n"


def _without_section(text: str) -> str:
    return re.sub(f"{re.escape(_BEGINS)}.*?{re.escape(_ENDS)}\\n*", "", text, flags=re.DOTALL)


def _section(folder: Path, facts: RunFacts) -> str:
    linked = [f"[{words}]({name})" for name, words in _LINKED if (folder / name).is_file()]
    parts = [
        _BEGINS,
        "## Training with LeMo",
        f"Fine-tuned by token-sparse training ([LeMo]({PAPER})): a sparse layer leaves a part of "
        "each row's tokens out in training. The weights are those of the plain model, which loads "
        "and runs without lemo-hf.",
        plain(facts.described),
        table([{"fact": name, "value": value} for name, value in _facts(facts)]),
    ]
    if linked:
        parts.append(f"Beside this card: {', '.join(linked)}.")
    return "\n\n".join([*parts, _ENDS])


def _facts(facts: RunFacts) -> Iterator[tuple[str, str]]:
    config, state, history = facts.config, facts.state, facts.state.log_history
    yield "base model", _base(facts.base)
    if config.threshold is None:
        yield "retention", _setting(config.retention)
    else:
        yield "threshold", _setting(config.threshold)
    yield "policy", str(config.policy)
    yield "tokens that the loss asks", config.supervise
    yield "finish", _finish(config, state)
    of = f" of {state.max_steps:,}" if state.max_steps > state.global_step else ""
    epoch = "" if state.epoch is None else f", until epoch {state.epoch:.3g}"
    yield "optimizer steps", f"{state.global_step:,}{of}, of {facts.rows:,} rows each{epoch}"
    logs = [line for line in history if "lemo/attention_retention" in line]
    if logs and all("lemo/tokens" in line for line in logs):
        yield from _sums(logs, facts)
    else:
        ends = [line["train_runtime"] for line in history if "train_runtime" in line]
        yield from (("time", _duration(seconds)) for seconds in ends[-1:])
    peaks = [line["lemo/peak_memory_gib"] for line in logs if "lemo/peak_memory_gib" in line]
    if peaks:
        device = f" ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else ""
        yield "peak GPU memory", f"{max(peaks):.1f} GiB{device}"
    losses = [line["loss"] for line in history if "loss" in line]
    if losses:
        yield "last training loss", f"{losses[-1]:.4g}"
    yield from _evaluated(history)
    packages = ["lemo-hf", "torch", "transformers"] + ["peft"] * ("peft" in sys.modules)
    yield "versions", ", ".join(f"{name} {version(name)}" for name in packages)


def _base(name: str | None) -> str:
    """Directories of this machine say nothing to others."""
    if not name:
        return "without a name"
    return name if is_repository(name) else f"{Path(name).name}, from a directory"


def _setting(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{min(value):g} to {max(value):g}, by layer"
    return f"{value:g}"


def _finish(config: LeMoConfig, state: TrainerState) -> str:
    if not config.finish:
        return "none"
    kept = "keep everything"
    if config.finish_retention < 1:
        kept = f"keep {config.finish_retention:.0%} of the blocks"
    rows = "" if config.dense_finish is not None else ", for rows that are labelled throughout"
    said = f"the last {100 * config.finish:.3g}% of the steps {kept}{rows}"
    if state.global_step <= state.max_steps - last_steps(config.finish, state.max_steps):
        said += f"; the run ended before, at step {state.global_step:,} of {state.max_steps:,}"
    return said


def _sums(logs: list[dict[str, Any]], facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Tokens and time of the logs; a log says what passed since the one before."""
    tokens = sum(int(line["lemo/tokens"]) for line in logs)
    kept, seconds = 0.0, 0.0
    for line in logs:
        shares = line["lemo/attention_retention"] + line["lemo/mlp_retention"]
        trained = line["lemo/tokens"] * shares / 2
        kept += trained
        seconds += trained / line["lemo/kept_tokens_per_second"]
    until = (
        "" if logs[-1]["step"] == facts.state.global_step else f" until step {logs[-1]['step']:,}"
    )
    each = "" if facts.processes == 1 else f" of process 0, which is one of {facts.processes}"
    share = kept / tokens if tokens else 1.0
    yield "tokens", f"{tokens:,}{each}{until}; the mean layer trained {kept:,.0f} ({share:.0%})"
    yield "time", f"{_duration(seconds)}{until}, without evaluations and saving"


def _evaluated(history: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Metrics of the last evaluation, whose datasets may have a line each."""
    lines = [line for line in history if any(name.startswith("eval_") for name in line)]
    for line in lines:
        if line.get("step") != lines[-1].get("step"):
            continue
        for name, value in line.items():
            metric = name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
            if metric and isinstance(value, int | float):
                yield name.replace("eval_", "evaluation ", 1).replace("_", " "), f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"
