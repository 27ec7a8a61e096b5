"""Settings of `lemo train`, section by section, and their checks.

Fields of a section are those of its dataclass: `ModelSection`, `DataSection`, peft's LoraConfig,
`LeMoConfig` and transformers' TrainingArguments. An unknown key or a wrong type is an error that
names the key, the value and where it came from.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lemo_hf.cli.mistakes import Mistakes, Several
from lemo_hf.cli.train_sections import DataSection, ModelSection, Run
from lemo_hf.cli.yaml_text import parse_yaml
from lemo_hf.config import LeMoConfig
from lemo_hf.shown import nearest, shown

SECTIONS = ("model", "data", "lora", "lemo", "training")
# Names of transformers until 5.17, which 5.23 warns of, and its names.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Names of transformers 4, and what is to be done instead.
GONE = {
    "group_by_length": "give --training.train_sampling_strategy group_by_length",
    "no_cuda": "give --training.use_cpu true",
    "evaluation_strategy": "give --training.eval_strategy",
}
# What is to be given, by the key it stands for.
_FLAGS = {
    "model.name": "--model NAME",
    "data.dataset": "--dataset NAME",
    "data.tokens": "--tokens NUMBER, or --memory-gib, which finds the longest that fits",
    "training.output_dir": "--output DIR",
}
_COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    "gradient_accumulation_steps",
)


@dataclass
class Settings:
    """Values by section and key, and the place where each was given.

    Attributes:
        values: Values of the given sections; ``lemo`` is False if training is dense.
        full: Whether all parameters are trained, without a section ``lora``.
        sources: File or flag that gave a value, by section and by ``section.key``.
    """

    values: dict[str, Any] = field(default_factory=dict)
    full: bool = False
    sources: dict[str, str] = field(default_factory=dict)

    def set(self, section: str, key: str, value: Any, source: str) -> None:
        """Set a value. It replaces an earlier one, also one given under an older name of the
        key."""
        key = RENAMED.get(key, key)
        if not isinstance(self.values.get(section), dict):
            self.values[section] = {}
        self.values[section][key] = value
        self.sources[f"{section}.{key}"] = source

    def build(self) -> Run:
        """The checked sections. Imports transformers, and peft where LoRA is asked for.

        Raises:
            ValueError: Keys are unknown or missing, or values are wrong; the message lists all of
                them.
            ImportError: LoRA is asked for, and peft is not installed.
        """
        with Mistakes() as mistakes:
            found: dict[str, Any] = {}
            for name, make in (
                ("model", self.model),
                ("data", self.data),
                ("lemo", self._lemo),
                ("lora", self._lora),
                ("training", self._training),
            ):
                with mistakes.noted():
                    found[name] = make()
            if not (self.full or "lora" in self.values):
                mistakes.add(
                    "the run must say what it trains: give --lora.r 8 and other fields of "
                    "LoraConfig, or --full."
                )
            if not self.values.get("training", {}).get("output_dir"):
                mistakes.add(f"training.output_dir is missing: {_FLAGS['training.output_dir']}.")
            if {"data", "training"} <= found.keys():
                data, training = found["data"], found["training"]
                if data.streaming and training.max_steps <= 0:
                    mistakes.add("data.streaming has no last row: set training.max_steps.")
                if training.max_steps <= 0 and training.num_train_epochs <= 0:
                    mistakes.add(
                        f"training.num_train_epochs={training.num_train_epochs:g} makes no step: "
                        "give a number above 0, or training.max_steps."
                    )
                for name in _COUNTS:
                    if (number := getattr(training, name)) < 1:
                        mistakes.add(f"training.{name} must be at least 1, got {number}.")
                if training.do_eval and data.heldout is None and data.eval_share is None:
                    mistakes.add(
                        "training.eval_strategy needs rows to evaluate on: set data.eval_dataset, "
                        "data.eval_split or data.eval_share."
                    )
        return Run(**found)

    def model(self) -> ModelSection:
        """The checked section; raises ValueError as `build` does."""
        return self._make(ModelSection, "model")

    def data(self) -> DataSection:
        """The checked section; raises ValueError as `build` does."""
        return self._make(DataSection, "data")

    def _training(self) -> Any:
        from transformers import TrainingArguments

        names = {new: old for old, new in RENAMED.items() if new not in _fields(TrainingArguments)}
        values = self.values.get("training", {})
        renamed = {names.get(key, key): value for key, value in values.items()}
        if values.get("do_train") is False:
            raise ValueError(
                f"{self._source('training', 'do_train')}: training.do_train=False has no effect, "
                "since lemo train trains: leave it out. lemo eval evaluates."
            )
        return self._make(TrainingArguments, "training", renamed)

    def _lora(self) -> Any:
        if "lora" not in self.values:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError('LoRA needs peft: pip install "lemo-hf[peft]".') from error
        values = {"task_type": "CAUSAL_LM", **self.values["lora"]}
        kind = values.get("peft_type", "LORA")
        if kind != "LORA":
            raise ValueError(
                f"{self._source('lora', 'peft_type')}: lora.peft_type={shown(kind)} has no effect, "
                "since lemo train makes LoRA adapters: leave it out."
            )
        rank = values.get("r", 8)
        if type(rank) is int and rank < 1:
            where = f"{self._source('lora', 'r')}: lora.r"
            raise ValueError(f"{where} must be at least 1, got {rank}.")
        return self._make(LoraConfig, "lora", values)

    def _lemo(self) -> LeMoConfig | None:
        values = self.values.get("lemo", {})
        if values is False:
            return None
        start, values = LeMoConfig(), dict(values)
        with Mistakes() as mistakes:
            for key, value in values.items():
                with mistakes.noted():
                    self._check_key(key, value, ["config", *_fields(LeMoConfig)], "lemo")
        source = values.pop("config", None)
        with _told(f"{self._source('lemo')}: lemo"):
            if source is not None:
                start = LeMoConfig.from_pretrained(source)
            if "threshold" in values:
                values.setdefault("retention", None)
            by_score = start.policy == "auto" and {"threshold", "mlp_threshold"} & values.keys()
            if "predictor" in values or by_score:
                values.setdefault("policy", None)
            return dataclasses.replace(start, **values)

    def _make(self, cls: type, section: str, given: dict[str, Any] | None = None) -> Any:
        values = dict(self.values.get(section, {}) if given is None else given)
        hints = get_type_hints(cls)
        with Mistakes() as mistakes:
            for key, value in values.items():
                with mistakes.noted():
                    self._check_key(key, value, _fields(cls), section)
                    where = f"{self._source(section, key)}: {section}.{key}"
                    values[key] = _checked(value, hints[key], where)
            for f in dataclasses.fields(cls):
                if f.default is f.default_factory is dataclasses.MISSING and f.name not in values:
                    flag = _FLAGS.get(f"{section}.{f.name}", f"--{section}.{f.name} VALUE")
                    mistakes.add(f"{self._source(section)}: {section}.{f.name} is missing: {flag}.")
        with _told(f"{self._source(section)}: {section}"):
            return cls(**values)

    def _check_key(self, key: str, value: Any, known: Sequence[str], section: str) -> None:
        if key not in known:
            where = f"{self._source(section, key)}: {section}.{key}={shown(value)}"
            if section == "training" and key in GONE:
                raise ValueError(f"{where}: transformers has no such key any more: {GONE[key]}.")
            raise ValueError(f"{where}: there is no such key{nearest(key, known)}")

    def _source(self, section: str, key: str = "") -> str:
        """The place where a key was given; for a whole section, its file and the flags that changed
        it."""
        if key:
            return self.sources.get(f"{section}.{key}") or self.sources.get(section, "flags")
        own = [source for name, source in self.sources.items() if name.startswith(f"{section}.")]
        return ", ".join(filter(None, [self.sources.get(section), *own])) or "flags"


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Within this context errors of a section's own checks also name the place it was read from."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Several as error:
        raise Several([ValueError(f"{where}: {each}") for each in error.each]) from error
    except Exception as error:  # of transformers' and peft's own classes, by a value that is wrong
        what = str(error) if isinstance(error, ValueError | TypeError) else repr(error)
        raise ValueError(f"{where}: {what}") from error


def _checked(value: Any, expected: Any, where: str) -> Any:
    """``value``, if it has a field's type; an integer is also a number."""
    from huggingface_hub.dataclasses import type_validator

    kinds = get_args(expected) or (expected,)
    try:
        if float in kinds and int not in kinds and type(value) is int:
            return float(value)
        if list[float] in kinds and isinstance(value, list):
            value = [float(x) if type(x) is int else x for x in value]
        if value is False and str in kinds and bool not in kinds:
            value = "no"  # which YAML reads as false
        type_validator(where, value, expected)
    except (TypeError, OverflowError) as error:
        meant = _meant(value, expected)
        raise ValueError(
            f"{where} must be {_type_name(expected)}, got {shown(value)}{meant}"
        ) from error
    return value


def _meant(value: Any, expected: Any) -> str:
    """The end of a sentence on a wrong type: a question for the number or truth value in quotes, or
    for a choice with nearly that name."""
    if not isinstance(value, str):
        return "."
    choices = [
        c for kind in _kinds(expected) if get_origin(kind) is Literal for c in get_args(kind)
    ]
    if choices:
        return nearest(value, choices)
    try:
        meant = parse_yaml(value, "it")
        meant = value if isinstance(meant, str) else _checked(meant, expected, "it")
    except ValueError:
        return "."
    return "." if meant == value else f": did you mean {meant}, without quotes?"


def _kinds(expected: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = get_origin(expected) in (Union, UnionType)
    return get_args(expected) if union else (expected,)


def _type_name(expected: Any) -> str:
    kinds = _kinds(expected)
    if any(get_origin(kind) is Literal for kind in kinds):
        choices = [c for kind in kinds for c in get_args(kind) or ("None",)]
        return f"one of {', '.join(map(str, choices))}"
    text = expected.__name__ if isinstance(expected, type) else str(expected)
    return re.sub(r"\b\w+\.", "", text).replace("NoneType", "None")


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]
