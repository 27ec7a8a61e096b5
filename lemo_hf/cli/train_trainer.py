"""The Trainer of `lemo train`, with the model and the rows it was asked for."""

from typing import Any

from lemo_hf.cli.train_look import Found
from lemo_hf.cli.train_model import load_for_training
from lemo_hf.cli.train_rows import collator, labels_cover_a_part, text_rows
from lemo_hf.cli.train_run import RunTrainer
from lemo_hf.cli.train_sections import Run


def make_trainer(run: Run, found: Found, asked: str, progress: bool) -> Any:
    """A `RunTrainer` for text, or a `RunSFTTrainer` for chats.

    Raises:
        OSError, ValueError: The model or a dataset cannot be read, or they do not fit.
    """
    tokenizer: Any = found.tokenizer
    shared: dict[str, Any] = {"processing_class": tokenizer, "lemo_config": run.lemo}
    if found.form is not None:
        import datasets

        from lemo_hf.cli.train_sft import RunSFTTrainer, chat_tables, sft_arguments

        if not progress:
            datasets.disable_progress_bars()
        rows, heldout = chat_tables(run, found.form)
        return RunSFTTrainer(
            asked,
            model=load_for_training(run, found.config),
            args=sft_arguments(run, found.form),
            train_dataset=rows,
            eval_dataset=heldout,
            **shared,
        )
    rows, heldout = text_rows(run.data, tokenizer, run.training.seed, progress)
    return RunTrainer(
        asked,
        asks=labels_cover_a_part(rows, run.data),
        model=load_for_training(run, found.config),
        args=run.training,
        train_dataset=rows,
        eval_dataset=heldout,
        data_collator=collator(tokenizer),
        **shared,
    )
