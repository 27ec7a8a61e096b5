"""`lemo train-predictor`."""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lemo_hf.cli.options import (
    Dataset,
    ModelOptions,
    Rows,
    Split,
    TextColumn,
    Tokens,
    load_rows,
    takes_model,
)


@takes_model
def train_predictor(
    model: ModelOptions,
    dataset: Dataset,
    output: Annotated[Path, typer.Option(help="Directory for the predictor; resumed if begun.")],
    push_to_hub: Annotated[
        str | None, typer.Option(help="Repository to upload the result to.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a block.")] = 64,
    mlp: Annotated[bool, typer.Option("--mlp", help="Predict for MLPs, too.")] = False,
    units: Annotated[int, typer.Option(min=1, help="ReLU units a layer, before pruning.")] = 128,
    normalize_scores: Annotated[
        bool, typer.Option("--normalize-scores", help="Learn means, not sums; see LeMoConfig.")
    ] = False,
    causal: Annotated[
        bool, typer.Option("--causal", help="Scores see nothing later (needs --normalize-scores).")
    ] = False,
    loss: Annotated[str, typer.Option(help="ranking, regression or distillation.")] = "ranking",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step and device.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-3,
    split: Split = "train",
    text_column: TextColumn = "text",
    tokens: Tokens = 8192,
    rows: Rows = 1000,
    heldout_rows: Annotated[
        int, typer.Option(min=0, help="Of them, rows to measure recall on; not trained on.")
    ] = 16,
    dense_below: Annotated[
        float | None,
        typer.Option(help="Leave out predictors with less recall than this at retention 0.5."),
    ] = None,
) -> None:
    """Train small networks that predict which blocks each layer needs, and measure their recall."""
    if dense_below is not None and not heldout_rows:
        raise ValueError(f"--dense-below {dense_below:g} needs recall: ask for --heldout-rows.")
    from accelerate import PartialState

    from lemo_hf.eval.plots import recall_figure, save_figure
    from lemo_hf.recall import recall_table
    from lemo_hf.train_predictor import PredictorTraining
    from lemo_hf.train_predictor import train_predictor as train

    how = PredictorTraining(
        block_size=block_size,
        heads=("attention", "mlp") if mlp else ("attention",),
        units=units,
        normalize_scores=normalize_scores,
        causal=causal,
        loss=loss,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    state = PartialState()
    lm, tokenizer = model.load(tokens)
    samples = load_rows(dataset, split, text_column, tokenizer, tokens, rows, state.is_main_process)
    ids = [sample["input_ids"] for sample in samples]
    if len(ids) <= heldout_rows:
        raise ValueError(
            f"the dataset gives {len(ids)} rows of {tokens} tokens and --heldout-rows takes "
            f"{heldout_rows} of them: use more text, shorter --tokens or fewer --heldout-rows."
        )
    # The last rows come from the last documents, which are then mostly unseen.
    train_ids, heldout = ids[: len(ids) - heldout_rows], ids[len(ids) - heldout_rows :]
    facts = {"datasets": dataset, "command": shlex.join(["lemo", *sys.argv[1:]])}
    predictor = train(lm, train_ids, how, output_dir=output, provenance=facts)
    if not state.is_main_process:
        return
    if heldout:
        table = recall_table(lm, predictor, {"held-out rows": heldout})
        predictor = predictor.with_recall(table)
        for line in table:
            print(
                f"recall of {line['policy']:<9} ({line['head']}) at retention "
                f"{line['retention']:g}: {line['mean']:.3f}, least of a layer {line['least']:.3f}"
            )
    if dense_below is not None:
        weak = predictor.weak_layers(dense_below)
        predictor = predictor.without(weak)
        for head, layers in weak.items():
            print(f"{head} predictors left out, recall below {dense_below:g}: layers {layers}")
    plot = output / "recall.png" if heldout and find_spec("matplotlib") else None
    if plot is not None:
        output.mkdir(parents=True, exist_ok=True)
        save_figure(recall_figure(table), plot)
    predictor.save_pretrained(output, plot=plot, repo_id=push_to_hub)
    print(f"Wrote {output}: LeMoConfig.from_pretrained({str(output)!r})")
    if push_to_hub is not None:
        print(predictor.push_to_hub(push_to_hub, plot=plot))
