"""The command `lemo`: what is done once, before training. Each command is one function here.

What they need is imported inside them, so that ``lemo --help`` answers at once.
"""

import dataclasses
import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo_hf.config import LeMoConfig

app = typer.Typer(
    help="LeMo for Hugging Face: long-context fine-tuning on the tokens each layer needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DType(StrEnum):
    """Of the model's weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


# Options that several commands share.
Model = Annotated[str, typer.Option(help="Causal LM: Hub id or directory.")]
Dataset = Annotated[
    list[str], typer.Option(help="Hub id, directory, or file (.jsonl, .txt, .parquet); repeatable.")
]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens a row: the length to train with.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows to use.")]
Device = Annotated[
    str | None, typer.Option(help="Such as cuda:1 or cpu; the first GPU if there is one.")
]
Dtype = Annotated[DType, typer.Option(help="Of the model's weights.")]
RopeParameters = Annotated[
    str | None,
    typer.Option(help='JSON put over the model\'s: \'{"rope_type": "linear", "factor": 4.0}\'.'),
]
MaxPositions = Annotated[int | None, typer.Option(min=1, help="Put over the model's own.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the model.")]


@app.callback()
def _lemo() -> None:
    """Makes typer ask for a command by name, however many there are."""


@app.command()
def calibrate(
    model: Model,
    dataset: Dataset,
    output: Annotated[Path, typer.Option(help="Directory for lemo_config.json.")],
    retention: Annotated[
        float | None, typer.Option(help="Mean retention of the sparse layers, in (0, 1].")
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            help="Instead: what forward and backward over one row may take, weights and gradients "
            "included, optimizer not. On a CPU: bytes saved for the backward."
        ),
    ] = None,
    thresholds: Annotated[
        bool, typer.Option("--thresholds", help="Calibrate score thresholds, not shares.")
    ] = False,
    config: Annotated[
        str | None, typer.Option(help="Directory or Hub id of the lemo_config.json to start from.")
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help="Learned predictors: directory, Hub id or 'auto'.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens a block.")] = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    tokens: Tokens = 8192,
    rows: Rows = 8,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Measure memory with it.")
    ] = False,
    device: Device = None,
    dtype: Dtype = DType.auto,
    rope_parameters: RopeParameters = None,
    max_position_embeddings: MaxPositions = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, without progress bars.")
    ] = False,
) -> None:
    """Find what each layer should keep of text like yours, and write it as a LeMoConfig."""
    if (retention is None) == (memory_gib is None):
        raise ValueError("give one of --retention and --memory-gib.")
    if thresholds and memory_gib is not None:
        raise ValueError("--thresholds needs --retention: what they keep depends on the text.")
    start = _start_config(config, predictor, block_size)

    from lemo_hf.allocate import allocate_memory, allocate_retention
    from lemo_hf.calibrate import calibrate_thresholds

    lm, tokenizer = load_model(
        model, device, dtype, rope_parameters, max_position_embeddings, trust_remote_code
    )
    samples = load_rows(dataset, split, text_column, tokenizer, tokens, rows, not as_json)
    progress = {"progress": not as_json}
    if thresholds:
        found = calibrate_thresholds(lm, samples, start, retention, **progress)
        result = {"dense_loss": found.dense_loss, "history": found.history}
    else:
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable()
        if memory_gib is not None:
            found = allocate_memory(lm, samples, start, memory_gib, **progress)
        else:
            found = allocate_retention(lm, samples, start, retention, **progress)
        result = {"dense_loss": found.dense_loss, "loss_rises": found.loss_rises}
    save(found.config, lm.config, output)
    if as_json:
        print(json.dumps({**result, "config": found.config.to_dict()}))
        return
    kept = found.config.threshold if thresholds else found.config.retention
    name = "thresholds" if thresholds else "retention"
    values = kept if isinstance(kept, tuple) else (kept,)
    print(f"{name}: {' '.join(f'{value:.3g}' for value in values)}")
    print(f"loss of the dense model: {found.dense_loss:.4f} nats a label")
    if thresholds:
        first, last = found.history[0], found.history[-1]
        print(
            f"rise above it: {first['loss_rise']:.4f} with one threshold, {last['loss_rise']:.4f} "
            f"with one each; mean retention {last['retention']:.3f}"
        )
    else:
        rises = ", ".join(f"{name} {rise:.4f}" for name, rise in found.loss_rises.items())
        print(f"rise above it: {rises}; the lowest was taken")
    print(f"Wrote {output / 'lemo_config.json'}: LeMoConfig.from_pretrained({str(output)!r})")


@app.command()
def train_predictor(
    model: Model,
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
    device: Device = None,
    dtype: Dtype = DType.auto,
    rope_parameters: RopeParameters = None,
    max_position_embeddings: MaxPositions = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train small networks that predict which blocks each layer needs, and measure their recall."""
    from accelerate import PartialState

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
    if device is None and state.num_processes > 1:
        device = str(state.device)
    lm, tokenizer = load_model(
        model, device, dtype, rope_parameters, max_position_embeddings, trust_remote_code
    )
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
    predictor.save_pretrained(output, repo_id=push_to_hub)
    print(f"Wrote {output}: LeMoConfig(predictor={str(output)!r})")
    if push_to_hub is not None:
        print(predictor.push_to_hub(push_to_hub))


def load_model(
    name: str,
    device: str | None,
    dtype: DType,
    rope_parameters: str | None,
    max_position_embeddings: int | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """The causal LM and its tokenizer, as the shared options ask for them.

    Raises:
        OSError: There is no such model, or it cannot be reached.
        ValueError: The rope parameters are no JSON object, or the device is none.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trust = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **trust)
    if rope_parameters is not None:
        try:
            wanted = json.loads(rope_parameters)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--rope-parameters is no JSON ({error}): {rope_parameters}"
            ) from error
        if not isinstance(wanted, dict):
            raise ValueError(f"--rope-parameters must be a JSON object, got {rope_parameters}")
        config.rope_parameters = {**(config.rope_parameters or {}), **wanted}
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {device!r}: {error}") from error
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype.value, **trust)
    return model.to(place), AutoTokenizer.from_pretrained(name, **trust)


def load_rows(
    dataset: list[str],
    split: str,
    text_column: str,
    tokenizer: Any,
    tokens: int,
    rows: int,
    progress: bool,
) -> list[dict[str, list[int]]]:
    """Rows of tokens, as the shared options ask for them; see `text_rows`."""
    from lemo_hf.text_rows import load_documents, token_rows

    documents = load_documents(dataset[0] if len(dataset) == 1 else dataset, split, text_column)
    return token_rows(documents, tokenizer, tokens, max_rows=rows, progress=progress)


def save(config: LeMoConfig, model_config: Any, output: Path) -> None:
    """Write ``config``, and the predictors that it names, so that ``output`` is all one needs."""
    if config.predictor is None:
        config.save_pretrained(output)
        return
    from lemo_hf.load_predictor import load_predictor

    load_predictor(config, model_config).save_files(output, config)


def _start_config(source: str | None, predictor: str | None, block_size: int | None) -> LeMoConfig:
    from lemo_hf.files import CONFIG_NAME, find_files

    given = {} if block_size is None else {"block_size": block_size}
    if predictor not in (None, "auto"):
        if source is not None:
            raise ValueError("--predictor brings a config of its own: leave out --config.")
        find_files(predictor, [CONFIG_NAME])
        source = predictor
    elif predictor is not None:
        given["predictor"] = predictor
    start = LeMoConfig() if source is None else LeMoConfig.from_pretrained(source)
    if "predictor" in given:
        given["policy"] = None
    return dataclasses.replace(start, **given)


def main() -> None:
    """Run the command line; a mistake of the user is one line and exit code 2."""
    try:
        app(prog_name="lemo")
    except (ValueError, OSError) as error:
        typer.secho(f"lemo: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
