"""What `lemo train` reads before it loads a model: config, tokenizer and first rows."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from lemo_hf.cli.mistakes import Mistakes
from lemo_hf.cli.train_chats import form_of, kind_of, names_of, use_template
from lemo_hf.cli.train_model import adapted, attention_of, load_config, load_tokenizer
from lemo_hf.cli.train_sections import DataSection, Run
from lemo_hf.patch import apply_lemo
from lemo_hf.shown import nearest
from lemo_hf.storage.files import CONFIG_NAME, find_files
from lemo_hf.storage.text_rows import load_examples

# By which a checkpoint may be called the best: of text, and what TRL computes beside it.
METRICS = ("loss",)
METRICS_OF_CHATS = (*METRICS, "mean_token_accuracy", "entropy")


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        config: Config of the model, with the positions that were asked for.
        tokenizer: Tokenizer, with the chat template that was asked for.
        form: Form that rows of chats get, see `form_of`; None: rows are text.
        facts: Sentences on what was found.
    """

    config: Any
    tokenizer: Any
    form: str | None
    facts: list[str]


def look(run: Run) -> Found:
    """Read the model's config and tokenizer, and the first row of each dataset.

    Raises:
        OSError, ValueError, ImportError: Something is missing, does not fit, or needs a package
            that is not installed; the message lists all of it.
    """
    config = tokenizer = None
    firsts: list[tuple[Mapping[str, Any], tuple[str, ...] | None]] = []
    facts = []
    with Mistakes() as mistakes:
        for tracker in run.training.report_to:
            with mistakes.noted():
                _check_tracker(tracker)
        with mistakes.noted():
            config = load_config(run.model, run.data.tokens)
            tokenizer = load_tokenizer(run.model)
            use_template(tokenizer, run.data)
        if config is not None:
            with mistakes.noted():
                facts.append(_try_without_memory(run, config))
        if run.lemo is not None and run.lemo.predictor not in (None, "auto"):
            with mistakes.noted():
                revision = run.lemo.predictor_revision
                find_files(run.lemo.predictor, [CONFIG_NAME], revision=revision)
        for name, data in _datasets(run.data):
            with mistakes.noted():
                row = next(load_examples(name, data.split))
                kind = kind_of(row, data, str(name))
                firsts.append((row, kind))
                columns = " and ".join(kind or [data.text_column or "text"])
                facts.append(f"{name} has rows of {columns}.")
        if firsts and tokenizer is not None:
            with mistakes.noted():
                form = _form(firsts, run, tokenizer)
                _check_metric(run.training, METRICS if form is None else METRICS_OF_CHATS)
    return Found(config, tokenizer, form, facts)


def _check_tracker(name: str) -> None:
    """Raises an error for a tracker of ``report_to`` that Trainer could not make."""
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    if name not in known:
        raise ValueError(
            f"training.report_to: there is no tracker {name!r}{nearest(name, known)} Trackers: "
            f"{', '.join(known)}, or 'none'."
        )
    is_there = getattr(integration_utils, f"is_{name}_available", lambda: True)
    if not is_there():
        raise ImportError(
            f"training.report_to={name!r} needs a package that is not installed: pip install "
            f"{name}, or leave it out."
        )


def _check_metric(training: Any, known: tuple[str, ...]) -> None:
    """Raises ValueError for a metric that evaluation does not compute: Trainer looks for it after
    the first one, which may be hours later."""
    name = training.metric_for_best_model
    if name is None or name.removeprefix("eval_") in known:
        return
    if known == METRICS:
        said = "evaluation computes the loss alone: leave it out, or give loss."
    else:
        said = f"evaluation of chats computes {', '.join(known[:-1])} and {known[-1]}"
        said += nearest(name.removeprefix("eval_"), known)
    raise ValueError(f"training.metric_for_best_model={name!r}: {said}")


def _datasets(data: DataSection) -> Iterator[tuple[Any, DataSection]]:
    for section in filter(None, (data, data.heldout)):
        for name in names_of(section):
            yield name, section


def _form(firsts: list[tuple[Any, Any]], run: Run, tokenizer: Any) -> str | None:
    """The form of all rows; checks that the tokenizer and the installed packages can make it."""
    chats = [(row, kind) for row, kind in firsts if kind is not None]
    data = run.data
    if not chats:
        if data.chat_template is not None:
            raise ValueError(
                "data.chat_template is for chats, and the rows are text: leave it out."
            )
        return None
    if data.min_tokens is not None:
        raise ValueError(
            "data.min_tokens is for text that is cut, and the rows are chats: leave it out."
        )
    if len(chats) < len(firsts):
        raise ValueError(
            "some datasets hold chats and others text: name the column with the text in "
            "data.text_column (all datasets must have it), or train on one after the other."
        )
    if find_spec("trl") is None:
        raise ImportError('chats and instructions need TRL: pip install "lemo-hf[trl]".')
    form = form_of(chats, tokenizer.chat_template is not None)
    if form == "texts":
        return form
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {run.model.name!r} has no chat template: give one in "
            "data.chat_template, use an instruct model, or rows whose prompt and completion are "
            "texts."
        )
    if form == "messages" and data.answers_only:
        from trl.chat_template_utils import get_training_chat_template

        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            of, file = f"of {run.model.name!r}", "a file for data.chat_template"
            if data.chat_template is not None:
                of, file = f"in data.chat_template={data.chat_template!r}", "that file"
            raise ValueError(
                f"the chat template {of} does not mark what the assistant says, and TRL knows no "
                "form of it that does. Put {% generation %} and {% endgeneration %} around that in "
                f"{file}, give rows of prompt and completion, or set data.answers_only to false."
            ) from error
    return form


def _try_without_memory(run: Run, config: Any) -> str:
    """Try adapters and LeMo on a model without weights. Returns a sentence on it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                trust_remote_code=run.model.trust_remote_code,
                **attention_of(run.model),
            )
    except (RuntimeError, NotImplementedError):  # it computes with what it has no memory for
        return f"{run.model.name} is a {config.model_type}."
    text = config.get_text_config()
    _check_targets(run.lora, model, text.num_hidden_layers)
    said = (
        f"{run.model.name} is a {config.model_type} of {text.num_hidden_layers} layers, "
        f"{model.num_parameters():,} parameters and {text.max_position_embeddings:,} positions."
    )
    with torch.device("meta"):
        model = adapted(model, copy.deepcopy(run.lora))
    if run.lemo is not None and run.lemo.policy != "predictor":
        apply_lemo(model, replace(run.lemo, cuda_graphs=False))
    return said


def _check_targets(lora: Any, model: Any, layers: int) -> None:
    """Raises ValueError for a name that no module or parameter has, or a layer that the model
    lacks: PEFT ignores it silently if another one is there."""
    if lora is None:
        return
    modules = [name for name, _ in model.named_modules()]
    if lora.target_modules != "all-linear":
        _check_names("target_modules", lora.target_modules, modules, "module")
    _check_names("exclude_modules", lora.exclude_modules, modules, "module")
    parameters = [name for name, _ in model.named_parameters()]
    _check_names("target_parameters", lora.target_parameters, parameters, "parameter")
    chosen = lora.layers_to_transform
    for layer in [chosen] if isinstance(chosen, int) else chosen or ():
        if not 0 <= layer < layers:
            raise ValueError(
                f"lora.layers_to_transform: the model has no layer {layer}: its layers are 0 to "
                f"{layers - 1}."
            )


def _check_names(key: str, asked: Any, known: list[str], what: str) -> None:
    """Raises ValueError unless each name is the end of a known one, or the regular expression
    matches one."""
    if isinstance(asked, str):
        if not any(re.fullmatch(asked, name) for name in known):
            raise ValueError(
                f"lora.{key}: {asked!r} is a regular expression, and it matches the whole name of "
                f"no {what}. For names of {what}s give a list: [{asked}]."
            )
        return
    for name in asked or ():
        if not any(f".{there}".endswith(f".{name}") for there in known):
            dots = name.count(".")
            last = sorted({".".join(there.split(".")[-1 - dots :]) for there in known})
            raise ValueError(f"lora.{key}: the model has no {what} {name!r}{nearest(name, last)}")
