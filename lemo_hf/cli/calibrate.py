"""`lemo calibrate`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from lemo_hf.config import LeMoConfig
from lemo_hf.outputs import check_output

if TYPE_CHECKING:
    from lemo_hf.allocate import Allocation
    from lemo_hf.calibrate import ThresholdCalibration


@takes_model
def calibrate(
    model: ModelOptions,
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, without progress bars.")
    ] = False,
) -> None:
    """Find what each layer should keep of text like yours, and write it as a LeMoConfig."""
    if (retention is None) == (memory_gib is None):
        raise ValueError("give one of --retention and --memory-gib.")
    if thresholds and memory_gib is not None:
        raise ValueError("--thresholds needs --retention: what they keep depends on the text.")
    check_output(output, "--output", directory=True)
    start = _start_config(config, predictor, block_size)

    from lemo_hf.allocate import Allocation, allocate_memory, allocate_retention
    from lemo_hf.calibrate import ThresholdCalibration, calibrate_thresholds

    lm, tokenizer = model.load(tokens)
    samples = load_rows(dataset, split, text_column, tokenizer, tokens, rows, not as_json)
    found: ThresholdCalibration | Allocation
    if thresholds and retention is not None:
        found = calibrate_thresholds(lm, samples, start, retention, progress=not as_json)
    else:
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable()
        if memory_gib is not None:
            found = allocate_memory(lm, samples, start, memory_gib, progress=not as_json)
        elif retention is not None:
            found = allocate_retention(lm, samples, start, retention, progress=not as_json)
    if as_json:
        how: dict[str, Any] = (
            {"history": found.history}
            if isinstance(found, ThresholdCalibration)
            else {"loss_rises": found.loss_rises}
        )
        result = {"dense_loss": found.dense_loss, **how, "config": found.config.to_dict()}
        print(json.dumps(result), flush=True)
    else:
        _tell(found, thresholds)
    save(found.config, lm.config, output)
    if not as_json:
        print(f"Wrote {output / 'lemo_config.json'}: LeMoConfig.from_pretrained({str(output)!r})")


def _tell(found: "ThresholdCalibration | Allocation", thresholds: bool) -> None:
    """The numbers as text."""
    from lemo_hf.calibrate import ThresholdCalibration

    kept = found.config.threshold if thresholds else found.config.retention
    name = "thresholds" if thresholds else "retention"
    values = kept if isinstance(kept, tuple) else (kept,)
    print(f"{name}: {' '.join(f'{value:.3g}' for value in values)}")
    print(f"loss of the dense model: {found.dense_loss:.4f} nats a label")
    if isinstance(found, ThresholdCalibration):
        first, last = found.history[0], found.history[-1]
        print(
            f"rise above it: {first['loss_rise']:.4f} with one threshold, {last['loss_rise']:.4f} "
            f"with one each; mean retention {last['retention']:.3f}"
        )
    else:
        rises = ", ".join(f"{name} {rise:.4f}" for name, rise in found.loss_rises.items())
        print(f"rise above it: {rises}; the lowest was taken", flush=True)


def save(config: LeMoConfig, model_config: Any, output: Path) -> None:
    """Write ``config``, and the predictors that it names, so that ``output`` is all one needs."""
    if config.predictor is None:
        config.save_pretrained(output)
        return
    from lemo_hf.load_predictor import load_predictor
    from lemo_hf.predictors.base_model import BaseModel

    base = BaseModel.from_config(model_config)
    load_predictor(config, base).save_files(output, config)


def _start_config(source: str | None, predictor: str | None, block_size: int | None) -> LeMoConfig:
    from lemo_hf.files import CONFIG_NAME, find_files

    given: dict[str, Any] = {} if block_size is None else {"block_size": block_size}
    if predictor is not None and predictor != "auto":
        if source is not None:
            raise ValueError("--predictor brings a config of its own: leave out --config.")
        find_files(predictor, [CONFIG_NAME])
        source = predictor
    elif predictor is not None:
        given["predictor"] = predictor
    start = LeMoConfig(policy="pooled") if source is None else LeMoConfig.from_pretrained(source)
    if "predictor" in given:
        given["policy"] = None
    return dataclasses.replace(start, **given)
