"""Sections of settings that only `lemo train` has, and the settings of a run."""

from dataclasses import dataclass
from typing import Any, Literal

from lemo_hf.cli.mistakes import Mistakes
from lemo_hf.config import LeMoConfig
from lemo_hf.shown import shown
from lemo_hf.storage.tables import are_files


@dataclass(frozen=True)
class ModelSection:
    """Settings of the causal LM and its loading.

    Attributes:
        name: Hub id or directory.
        revision: Branch, tag or commit of a Hub repository.
        dtype: Dtype of the weights.
        attn_implementation: Attention as for `from_pretrained`; None is transformers' own choice.
        rope_type: Way in which positions are stretched to ``data.tokens``.
        rope_parameters: RoPE parameters, which replace the model's own.
        max_position_embeddings: Number of positions, which replaces the model's own.
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
    """Settings of the text or the chats, and of the rows of tokens made from them.

    Attributes:
        dataset: Hub id, directory, or one or several files (.jsonl, .txt, .parquet); with
            ``weights`` several datasets of any kind.
        tokens: Length of a row. Longer documents and chats are cut.
        weights: Share of each dataset among the rows; None: files, one after the other.
        split: Split of a Hub dataset or a directory.
        text_column: Column that holds the text; None: ``"text"``, if there are no columns of chats
            (see `lemo_hf.cli.train_chats`).
        answers_only: Whether only the answers of a chat have labels.
        chat_template: File of a Jinja template that replaces the tokenizer's.
        packing: Whether rows hold several documents or chats, none of which sees another.
        streaming: Whether rows are made when they are asked for; it needs ``training.max_steps``.
        min_tokens: Tokens from which the rest of a document is a shorter row, without packing.
        max_rows: Most rows that are made, or chats that are read.
        eval_dataset: Dataset to evaluate on, named like ``dataset``; None: ``dataset`` if there is
            an ``eval_split``, else none.
        eval_split: Split of the dataset to evaluate on; None: ``"test"``.
        eval_share: Share of the rows that is held out to evaluate on, instead of another dataset.
        max_eval_rows: Most rows to evaluate on.
    """

    dataset: str | list[str]
    tokens: int
    weights: list[float] | None = None
    split: str = "train"
    text_column: str | None = None
    answers_only: bool = True
    chat_template: str | None = None
    packing: bool = False
    streaming: bool = False
    min_tokens: int | None = None
    max_rows: int | None = None
    eval_dataset: str | list[str] | None = None
    eval_split: str | None = None
    eval_share: float | None = None
    max_eval_rows: int | None = None

    def __post_init__(self) -> None:
        with Mistakes() as mistakes:
            for name, least in (("tokens", 2), ("max_rows", 1), ("max_eval_rows", 1)):
                value = getattr(self, name)
                if value is not None and value < least:
                    mistakes.add(f"{name} must be at least {least}, got {value}")
            for name in ("dataset", "eval_dataset"):
                if getattr(self, name) in ("", []):
                    mistakes.add(f"{name}={getattr(self, name)!r} names nothing: name a dataset")
            if self.packing and self.min_tokens is not None:
                mistakes.add(
                    f"min_tokens={self.min_tokens} has no meaning with packing: leave it out"
                )
            if self.weights is not None and (
                isinstance(self.dataset, str)
                or len(self.weights) != len(self.dataset)
                or min(self.weights, default=0) <= 0
            ):
                mistakes.add(
                    f"weights={shown(self.weights)} must hold a number above 0 for each of the "
                    f"datasets {shown(self.dataset)}"
                )
            if _are_files(self.dataset):  # or rows of one split would be those of another
                if self.split != "train":
                    mistakes.add(f"split={self.split!r}: files have no splits: leave it out")
                if self.eval_split is not None and self.eval_dataset is None:
                    mistakes.add(
                        f"eval_split={self.eval_split!r}: files have no splits, so these are the "
                        "rows that train: give eval_dataset or eval_share"
                    )
            if self.eval_share is not None:
                if not 0 < self.eval_share < 1:
                    mistakes.add(f"eval_share must lie in (0, 1), got {self.eval_share:g}")
                others = [self.eval_dataset, self.eval_split, self.streaming or None]
                if others != [None] * 3:
                    mistakes.add(
                        f"eval_share={self.eval_share:g} excludes eval_dataset, eval_split and "
                        "streaming: leave it out, or leave them out"
                    )

    @property
    def heldout(self) -> "DataSection | None":
        """The data to evaluate on, as a section of its own; None if there is none, or if it is a
        share of the rows."""
        dataset = self.eval_dataset
        if dataset is None and self.eval_split is not None:
            dataset = self.dataset
        if dataset is None:
            return None
        return DataSection(
            dataset=dataset,
            tokens=self.tokens,
            weights=self.weights if self.eval_dataset is None else None,
            split="train" if _are_files(dataset) else self.eval_split or "test",
            text_column=self.text_column,
            answers_only=self.answers_only,
            packing=self.packing,
            min_tokens=self.min_tokens,
            max_rows=self.max_eval_rows,
        )


def _are_files(dataset: str | list[str]) -> bool:
    return bool(dataset) and are_files([dataset] if isinstance(dataset, str) else dataset)


@dataclass(frozen=True)
class Run:
    """The checked settings of a run; ``lora`` or ``lemo`` is None if the run does not have it."""

    model: ModelSection
    data: DataSection
    lora: Any
    lemo: LeMoConfig | None
    training: Any

    @property
    def reads(self) -> list[str]:
        """Names of what the run reads: the model, the data, a predictor, a checkpoint."""
        names = [self.model.name, self.training.resume_from_checkpoint]
        for dataset in (self.data.dataset, self.data.eval_dataset):
            names += [dataset] if isinstance(dataset, str) else dataset or []
        names += [] if self.lemo is None else [self.lemo.predictor]
        return [name for name in names if name is not None]
