"""`lemo train-predictor`."""

import math
import shlex
import sys
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo_hf.cli.options import (
    Dataset,
    ModelOptions,
    Rows,
    Split,
    TextColumn,
    Tokens,
    path_option,
    takes_model,
)
from lemo_hf.storage.outputs import check_output, only_run


@takes_model
def train_predictor(
    model: ModelOptions,
    dataset: Dataset,
    output: Annotated[
        Path,
        path_option(
            help="Directory for the predictor; an interrupted run resumes.",
        ),
    ],
    push_to_hub: Annotated[
        str | None, typer.Option(help="Repository to upload the result to.")
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Layer that gets a predictor; repeatable. Default: at 0.4 of the depth."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a block.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Size of a token's query and key.")] = 512,
    asking: Annotated[int, typer.Option(min=1, help="Most asking blocks a row.")] = 32,
    epochs: Annotated[
        int, typer.Option(min=0, help="Passes over the rows; 0: nothing is learned.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step on each device.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 3e-4,
    split: Split = "train",
    text_column: TextColumn = "text",
    tokens: Tokens = 8192,
    rows: Rows = 1000,
    heldout_rows: Annotated[
        int, typer.Option(min=0, help="Last rows, held out to measure recall.")
    ] = 16,
) -> None:
    """Make small networks that find the blocks which labels need, and measure their recall.

    Without --epochs nothing is learned: tokens look for similar tokens. That found more of the
    blocks that answers need than training on the model's attention did.

    The dataset holds texts, or rows of which a part is labelled: columns prompt and completion, or
    input_ids and labels.
    """
    check_output(output, "--output", directory=True)

    from accelerate import PartialState

    from lemo_hf.tune.train_predictor import PredictorTraining, remove_state
    from lemo_hf.tune.train_predictor import train_predictor as train

    how = PredictorTraining(
        layers=None if not layer else tuple(layer),
        block_size=block_size,
        rank=rank,
        asking=asking,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    state = PartialState()
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"--learning-rate {learning_rate:g}: give a number above 0, such as 3e-4.")
    _check_rows(dataset, split, text_column)
    lm, tokenizer = model.load(tokens)
    samples = _rows(dataset, split, text_column, tokenizer, tokens, rows, state.is_main_process)
    if len(samples) <= heldout_rows:
        raise ValueError(
            f"the dataset gives {len(samples)} rows of {tokens} tokens and --heldout-rows takes "
            f"{heldout_rows} of them: use more text, shorter --tokens or fewer --heldout-rows."
        )
    # The last rows come from the last documents, which are then mostly unseen.
    last = len(samples) - heldout_rows
    facts = {"datasets": dataset, "command": shlex.join(["lemo", *sys.argv[1:]])}
    with only_run(output) if state.is_main_process else nullcontext():
        predictor = train(lm, samples[:last], how, output_dir=output, provenance=facts)
        if not state.is_main_process:
            return
        if heldout_rows:
            predictor = _with_recall(lm, predictor, samples[last:])
        predictor.save_pretrained(output, repo_id=push_to_hub)
        remove_state(output)
    print(f"Wrote {output}: LeMoConfig.from_pretrained({str(output)!r})")
    if push_to_hub is not None:
        print(predictor.push_to_hub(push_to_hub))


def _with_recall(lm: Any, predictor: Any, heldout: list[dict[str, list[int]]]) -> Any:
    """The predictor with its recall; prints it."""
    from lemo_hf.tune.recall import recall_table

    table = recall_table(lm, predictor, {"held-out rows": heldout})
    for line in table:
        print(
            f"layer {line['layer']}, retention {line['retention']:g}: recall of "
            f"{line['policy']} {line['recall']:.3f}",
            flush=True,
        )
    return predictor.with_recall(table)


def _is_labelled(row: dict[str, Any]) -> bool:
    return {"input_ids", "labels"} <= set(row) or {"prompt", "completion"} <= set(row)


def _check_rows(dataset: list[str], split: str, text_column: str) -> None:
    """Raise errors of `_rows` that the first row shows, before a model is loaded."""
    from lemo_hf.storage.text_rows import check_documents, load_examples

    if not _is_labelled(next(load_examples(dataset, split))):
        check_documents(dataset, split, text_column)


def _rows(
    dataset: list[str],
    split: str,
    text_column: str,
    tokenizer: Any,
    tokens: int,
    rows: int,
    progress: bool,
) -> list[dict[str, list[int]]]:
    """Rows that have labels, unchanged, or texts cut into rows."""
    from lemo_hf.storage.text_rows import labelled_rows, load_documents, load_examples, token_rows

    examples = load_examples(dataset, split)
    first = next(examples)  # there is one, or an error
    if _is_labelled(first):
        return labelled_rows(chain([first], examples), tokenizer, tokens, rows, progress)
    documents = load_documents(dataset, split, text_column)
    name = ", ".join(dataset)
    return token_rows(documents, tokenizer, tokens, max_rows=rows, progress=progress, name=name)
