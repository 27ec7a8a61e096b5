"""The trainer of chats for `lemo train`: TRL's SFTTrainer makes their rows."""

import copy
from itertools import islice
from typing import Any

from lemo_hf.announce import announce
from lemo_hf.batch.facts import covers_a_part
from lemo_hf.cli.train_chats import chat_table
from lemo_hf.cli.train_run import RunMixin
from lemo_hf.cli.train_sections import DataSection, Run
from lemo_hf.integrations.trl import LeMoSFTTrainer
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX

FIRST = 256  # rows of a stream that are looked at


class RunSFTTrainer(RunMixin, LeMoSFTTrainer):
    """`LeMoSFTTrainer` of a run, which says how many answers its rows cut."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *more: Any) -> Any:
        # TRL tokenises and cuts in one go: first without an end, so that it is seen what is cut.
        whole = copy.copy(args)
        whole.max_length = None
        _, formatting, name = more
        dataset = super()._prepare_dataset(
            dataset, processing_class, whole, False, formatting, name
        )
        said, asks = cut_answers(dataset, args.max_length, name)
        if name == "train":
            self.asks = asks
        if said:
            announce(args, f"{name}: {said}")
        return super()._prepare_dataset(dataset, processing_class, args, *more)


def cut_answers(rows: Any, tokens: int, name: str) -> tuple[str, bool | None]:
    """A sentence on the rows that are longer than ``tokens``, empty if there are none; and whether
    labels cover only a part of each row that is cut so, None if rows differ or are not all known.

    Raises:
        ValueError: No row of the dataset ``name`` has a label among its first ``tokens`` tokens.
    """
    streamed = not hasattr(rows, "__len__")
    seen = longer = answers = lost = longest = parts = 0
    for row in islice(rows.with_format("numpy"), FIRST if streamed else None):
        length, labelled = len(row["input_ids"]), row["labels"] != IGNORE_INDEX
        seen, longest = seen + 1, max(longest, length)
        longer += length > tokens
        answers += bool(labelled[tokens:].any())
        lost += not labelled[:tokens].any()
        parts += bool(covers_a_part(labelled[1:tokens].sum(), min(length, tokens)))
    if lost == seen and not streamed:  # the rows of a stream that come later may have some
        raise ValueError(
            f"{name}: none of {seen:,} rows has a label within data.tokens={tokens:,}; the longest "
            f"has {longest:,} tokens. Give longer rows by --tokens, or rows with a shorter "
            "context."
        )
    asks = None if streamed or 0 < parts < seen else parts > 0
    if not longer:
        return "", asks
    return (
        f"{longer:,} of {'the first ' if streamed else ''}{seen:,} rows are longer than "
        f"data.tokens={tokens:,} and are cut. Answers lose their end in {answers:,} of them; "
        f"{lost:,} lose all labels and teach nothing. The longest row has {longest:,} tokens.",
        asks,
    )


def chat_tables(run: Run, form: str) -> tuple[Any, Any]:
    """The dataset to train on, and the one to evaluate on, or None."""
    data, seed = run.data, run.training.seed
    table = chat_table(data, form, seed)
    if data.heldout is not None:
        return table, chat_table(data.heldout, form, seed)
    if data.eval_share is None:
        return table, None
    parts = table.train_test_split(test_size=data.eval_share, seed=seed)
    heldout = parts["test"]
    if data.max_eval_rows is not None:
        heldout = heldout.take(min(data.max_eval_rows, len(heldout)))
    return parts["train"], heldout


def sft_arguments(run: Run, form: str) -> Any:
    """TRL's SFTConfig of a run, from its TrainingArguments and its section ``data``."""
    from trl import SFTConfig

    data: DataSection = run.data
    values = run.training.to_dict() | {"hub_token": run.training.hub_token}  # else it is hidden
    return SFTConfig(
        **values,
        max_length=data.tokens,
        packing=data.packing,
        eval_packing=False,
        assistant_only_loss=data.answers_only and form == "messages",
        completion_only_loss=data.answers_only and form != "messages",
    )
