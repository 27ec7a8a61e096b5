"""Options that commands share, and the model and the rows that they name."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer


class DType(StrEnum):
    """Of the model's weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


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
RopeType = Annotated[
    str | None,
    typer.Option(help="Stretch positions to the length: linear, yarn, dynamic. Default: as saved."),
]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter over it: Hub id or directory.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the model.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, without progress bars.")
]


def load_model(
    name: str,
    device: str | None,
    dtype: DType,
    rope_parameters: str | None,
    max_position_embeddings: int | None,
    trust_remote_code: bool,
    *,
    adapter: str | None = None,
    rope_type: str | None = None,
    length: int | None = None,
) -> tuple[Any, Any]:
    """The causal LM and its tokenizer, as the shared options ask for them.

    Raises:
        OSError: There is no such model, or it cannot be reached.
        ValueError: The rope parameters are no JSON object, the device is none, or positions cannot
            be stretched.
        ImportError: An adapter is asked for and peft is not installed.
    """
    import torch
    from accelerate import PartialState
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trust = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **trust)
    if rope_type is not None:
        _stretch_positions(config, rope_type, length)
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
    if device is None:
        several = PartialState().num_processes > 1
        gpu = "cuda" if torch.cuda.is_available() else "cpu"
        device = str(PartialState().device) if several else gpu
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device!r}: {error}") from error
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype.value, **trust)
    tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    if adapter is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError(f'--adapter {adapter}: pip install "lemo-hf[peft]".') from error
        model = PeftModel.from_pretrained(model, adapter)
    return model.to(place), tokenizer


def _stretch_positions(config: Any, rope_type: str, length: int) -> None:
    """Scale rotary positions so that ``length`` tokens fit where the model's own fitted before."""
    rope, known = config.rope_parameters, config.max_position_embeddings
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise ValueError(
            f"--rope-type {rope_type}: {config.model_type!r} has no single set of rotary "
            "parameters to stretch: give --rope-parameters."
        )
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"--rope-type {rope_type}: the model's positions are stretched already ({rope}): give "
            "--rope-parameters to put something else in their place."
        )
    if rope_type not in ("linear", "yarn", "dynamic"):
        raise ValueError(f"--rope-type must be linear, yarn or dynamic, got {rope_type!r}.")
    if length > known:
        stretched = {"rope_type": rope_type, "factor": length / known}
        if rope_type != "linear":
            stretched["original_max_position_embeddings"] = known
        config.rope_parameters = {**rope, **stretched}
        config.max_position_embeddings = length


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
