"""What `lemo train` is asked for, section by section, and its checks.

Fields of a section are those of its dataclass: `ModelSection`, `DataSection`, peft's LoraConfig,
`LeMoConfig` and transformers' TrainingArguments. An unknown key or a wrong type is an error that
names the key, the value and where it came from.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from lemo_hf.config import LeMoConfig
from lemo_hf.shown import nearest, shown

SECTIONS = ("model", "data", "lora", "lemo", "training")


@dataclass(frozen=True)
class ModelSection:
    """Which causal LM, and how it is loaded.

    Attributes:
        name: Hub id or directory.
        revision: Branch, tag or commit of the Hub's.
        dtype: Dtype of the weights.
        attn_implementation: Attention as for `from_pretrained`; None is transformers' own choice.
        rope_type: Way in which positions are stretched to ``data.tokens``.
        rope_parameters: RoPE parameters, put over the model's own.
        max_position_embeddings: Number of positions, put over the model's own.
        trust_remote_code: Whether Python code that comes with the model is run.
    """

    name: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: str | None = None
    rope_type: Literal["linear", "yarn", "dynamic"] | None = None
    rope_parameters: dict | None = None
    max_position_embeddings: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSection:
    """Which text, and how rows of tokens are made of it.

    Attributes:
        dataset: Hub id, directory, or one or several files (.jsonl, .txt, .parquet).
        tokens: Length of a row. Longer documents are cut.
        split: Split of a Hub dataset or a directory.
        text_column: Column that holds the text.
        packing: Whether rows hold several documents, none of which sees another.
        min_tokens: Tokens from which the rest of a document is a shorter row, without packing.
        max_rows: Most rows that are made.
        eval_dataset: Dataset to evaluate on, likewise.
        eval_split: Split of that.
        max_eval_rows: Most rows of that.
    """

    dataset: str | list[str]
    tokens: int
    split: str = "train"
    text_column: str = "text"
    packing: bool = False
    min_tokens: int | None = None
    max_rows: int | None = None
    eval_dataset: str | list[str] | None = None
    eval_split: str = "test"
    max_eval_rows: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"tokens must be at least 2, got {self.tokens}")
        if self.packing and self.min_tokens is not None:
            raise ValueError(f"min_tokens={self.min_tokens} has no meaning with packing: drop it")


@dataclass(frozen=True)
class Run:
    """A run as it was asked for, checked; ``lora`` or ``lemo`` is None where there is none."""

    model: ModelSection
    data: DataSection
    lora: Any
    lemo: LeMoConfig | None
    training: Any


@dataclass
class Settings:
    """Values by section and key, and where each was said.

    Attributes:
        values: Values of the sections that are there; ``lora`` is left out where all parameters are
            trained, ``lemo`` is False where training is dense.
        sources: File or flag, by section and by ``section.key``.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def set(self, section: str, key: str, value: Any, source: str) -> None:
        """Put a value over what was there."""
        if not isinstance(self.values.get(section), dict):
            self.values[section] = {}
        self.values[section][key] = value
        self.sources[f"{section}.{key}"] = source

    def build(self) -> Run:
        """The checked sections. Imports transformers, and peft where LoRA is asked for.

        Raises:
            ValueError: A key is unknown or missing, or a value is wrong.
            ImportError: LoRA is asked for and peft is not installed.
        """
        # Cheap sections first: a typing error in them is told before transformers is imported.
        model, data = self.model(), self.data()
        lemo = self._lemo()

        from transformers import TrainingArguments

        if not self.values.get("training", {}).get("output_dir"):
            raise ValueError("say where results go: --output DIR, or training.output_dir.")
        training = self._make(TrainingArguments, "training")
        return Run(model, data, self._lora(), lemo, training)

    def model(self) -> ModelSection:
        """The checked section; raises ValueError as `build` does."""
        return self._make(ModelSection, "model")

    def data(self) -> DataSection:
        """The checked section; raises ValueError as `build` does."""
        return self._make(DataSection, "data")

    def _lora(self) -> Any:
        if "lora" not in self.values:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError('LoRA needs peft: pip install "lemo-hf[peft]".') from error
        return self._make(LoraConfig, "lora", task_type="CAUSAL_LM")

    def _lemo(self) -> LeMoConfig | None:
        values = self.values.get("lemo", {})
        if values is False:
            return None
        start, values = LeMoConfig(), dict(values)
        self._check_keys(values, ["config", *_fields(LeMoConfig)], "lemo")
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

    def _make(self, cls: type, section: str, **defaults: Any) -> Any:
        values = {**defaults, **self.values.get(section, {})}
        self._check_keys(values, _fields(cls), section)
        hints = get_type_hints(cls)
        for key, value in values.items():
            source = self._source(section, key)
            values[key] = _checked(value, hints[key], f"{source}: {section}.{key}")
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            raise ValueError(f"{self._source(section)}: {section}.{missing[0]} is missing.")
        with _told(f"{self._source(section)}: {section}"):
            return cls(**values)

    def _check_keys(self, values: Mapping[str, Any], known: Sequence[str], section: str) -> None:
        for key, value in values.items():
            if key not in known:
                where = f"{self._source(section, key)}: {section}.{key}={shown(value)}"
                raise ValueError(f"{where}: there is no such key{nearest(key, known)}")

    def _source(self, section: str, key: str = "") -> str:
        """Where a key was said; of a whole section, its file and the flags that went over it."""
        if key:
            return self.sources.get(f"{section}.{key}") or self.sources.get(section, "flags")
        own = [source for name, source in self.sources.items() if name.startswith(f"{section}.")]
        return ", ".join(filter(None, [self.sources.get(section), *own])) or "flags"


@contextmanager
def _told(where: str) -> Iterator[None]:
    """An error of a section's own checks is told with the place it was read from."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # of transformers' and peft's own classes, by a value that is wrong
        what = str(error) if isinstance(error, ValueError | TypeError) else repr(error)
        raise ValueError(f"{where}: {what}") from error


def _checked(value: Any, expected: Any, where: str) -> Any:
    """``value`` if it is of a field's type; whole numbers are numbers, too."""
    from huggingface_hub.dataclasses import type_validator

    kinds = get_args(expected) or (expected,)
    try:
        if type(value) is int and float in kinds and int not in kinds:
            return float(value)
        type_validator(where, value, expected)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{where} must be {_type_name(expected)}, got {shown(value)}.") from error
    return value


def _type_name(expected: Any) -> str:
    text = expected.__name__ if isinstance(expected, type) else str(expected)
    return re.sub(r"\b\w+\.", "", text).replace("NoneType", "None")


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]
