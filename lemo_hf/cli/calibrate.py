"""`lemo calibrate`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo_hf.cli.options import (
    AsJson,
    Dataset,
    ModelOptions,
    Rows,
    Split,
    TextColumn,
    Tokens,
    path_option,
    takes_model,
)
from lemo_hf.config import LeMoConfig
from lemo_hf.storage.config_file import check_no_predictor
from lemo_hf.storage.outputs import check_output


@takes_model
def calibrate(
    model: ModelOptions,
    dataset: Dataset,
    output: Annotated[
        Path,
        path_option(help="Directory for lemo_config.json."),
    ],
    retention: Annotated[
        float, typer.Option(help="Mean retention of the sparse layers, in (0, 1].")
    ],
    config: Annotated[
        str | None, typer.Option(help="Directory or Hub id of a lemo_config.json to start from.")
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help="Learned predictors: directory, Hub id or 'auto'.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens a block.")] = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    tokens: Tokens = 8192,
    rows: Rows = 8,
    as_json: AsJson = False,
) -> None:
    """Find a score threshold for each layer on text like yours, and write them as a LeMoConfig."""
    check_output(output, "--output", directory=True)
    start = _start_config(config, predictor, block_size)
    check_no_predictor(output, start.predictor)

    from lemo_hf.storage.text_rows import check_documents, load_documents, token_rows
    from lemo_hf.tune.calibrate import calibrate_thresholds

    check_documents(dataset, split, text_column)
    lm, tokenizer = model.load(tokens)
    progress = not as_json
    documents = load_documents(dataset, split, text_column)
    name = ", ".join(dataset)
    samples = token_rows(documents, tokenizer, tokens, max_rows=rows, progress=progress, name=name)
    found = calibrate_thresholds(lm, samples, start, retention, progress=progress)
    first, last = found.history[0], found.history[-1]
    if as_json:
        result = {"dense_loss": found.dense_loss, "history": found.history}
        print(json.dumps({**result, "config": found.config.to_dict()}), flush=True)
    else:
        print("thresholds:", *(f"{threshold:.3g}" for threshold in last["thresholds"]))
        print(f"loss of the dense model: {found.dense_loss:.4f} nats a label")
        print(
            f"rise above it: {first['loss_rise']:.4f} with one threshold, {last['loss_rise']:.4f} "
            f"with one each; mean retention {last['retention']:.3f}",
            flush=True,
        )
    save(found.config, lm.config, output)
    if not as_json:
        print(f"Wrote {output / 'lemo_config.json'}: LeMoConfig.from_pretrained({str(output)!r})")


def save(config: LeMoConfig, model_config: Any, output: Path) -> None:
    """Write ``config``, and the predictors that it names, so that ``output`` has everything
    needed."""
    if config.predictor is None:
        config.save_pretrained(output)
        return
    from lemo_hf.load_predictor import load_predictor
    from lemo_hf.predictors.base_model import BaseModel

    base = BaseModel.from_config(model_config)
    load_predictor(config, base).save_files(output, config)


def _start_config(source: str | None, predictor: str | None, block_size: int | None) -> LeMoConfig:
    from lemo_hf.storage.files import CONFIG_NAME, find_files

    given: dict[str, Any] = {} if block_size is None else {"block_size": block_size}
    if predictor is not None and predictor != "auto":
        if source is not None:
            raise ValueError("--predictor has a config of its own: leave out --config.")
        find_files(predictor, [CONFIG_NAME])
        source = predictor
    elif predictor is not None:
        given["predictor"] = predictor
    start = LeMoConfig(policy="pooled") if source is None else LeMoConfig.from_pretrained(source)
    if "predictor" in given:
        given["policy"] = None
    return dataclasses.replace(start, **given)
