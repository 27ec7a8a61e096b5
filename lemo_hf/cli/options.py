"""Options that commands share, and the loading of the model and the config that they name."""

import functools
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo_hf.cli.loading import load_causal_lm, loading
from lemo_hf.cli.positions import change_positions, check_length
from lemo_hf.shown import shortened
from lemo_hf.storage.files import near_path, parse_json, read_json


class DType(StrEnum):
    """Dtype of the model's weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


RESERVE_GIB = 2.0  # of a GPU, for the CUDA context and fragmentation
MODEL = "Causal LM: Hub id or directory."
Model = Annotated[str, typer.Option(help=MODEL)]
Dataset = Annotated[
    list[str], typer.Option(help="Hub id, directory, or file (.jsonl, .txt, .parquet); repeatable.")
]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens a row: the length to train with.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows to use.")]
Dtype = Annotated[DType, typer.Option(help="Dtype of the model's weights.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the model.")]


def given_path(text: str) -> Path:
    """A path from the command line. An empty one, as of a variable that is not set, would be the
    current directory."""
    if not text.strip():
        raise typer.BadParameter(f"{text!r} is empty: give a path ('.' is this directory).")
    return Path(text)


path_option = functools.partial(typer.Option, parser=given_path, metavar="PATH")


def _without_bars(context: typer.Context, as_json: bool) -> bool:
    """Transformers shows none either, when it loads and writes weights, until the command ends."""
    if as_json:
        from transformers.utils import logging

        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            context.call_on_close(logging.enable_progress_bar)
    return as_json


AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON, without progress bars.",
        callback=_without_bars,
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Options that name a model and say how to load it; see `takes_model`."""

    model: Model
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter of the model: Hub id or directory.")
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Device, such as cuda:1 or cpu; default: the first GPU.")
    ] = None
    dtype: Dtype = DType.auto
    rope_type: Annotated[
        str | None,
        typer.Option(help="Stretch positions to the given length: linear, yarn or dynamic."),
    ] = None
    rope_parameters: Annotated[
        str | None,
        typer.Option(help='RoPE parameters as JSON: \'{"rope_type": "linear", "factor": 4.0}\'.'),
    ] = None
    max_position_embeddings: Annotated[
        int | None, typer.Option(min=1, help="Number of positions, which replaces the model's own.")
    ] = None
    trust_remote_code: TrustRemoteCode = False

    def load(self, length: int | None = None) -> tuple[Any, Any]:
        """The causal LM and its tokenizer.

        Args:
            length: Tokens to which ``rope_type`` stretches positions.

        Raises:
            OSError: There is no such model, or it cannot be reached.
            ValueError: The rope parameters are not a JSON object, the device does not exist,
                positions cannot be stretched, or a file of the model is damaged.
            ImportError: An adapter is asked for and peft is not installed.
        """
        with loading(self.model):
            return self._load(length)

    def _load(self, length: int | None) -> tuple[Any, Any]:
        import torch
        from accelerate import PartialState
        from transformers import AutoTokenizer

        trust = {"trust_remote_code": self.trust_remote_code}
        config = self._config(length)
        device = self.device
        if device is None:
            several = PartialState().num_processes > 1
            gpu = "cuda" if torch.cuda.is_available() else "cpu"
            device = str(PartialState().device) if several else gpu
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"--device {device!r}: {error}") from error
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device!r}: PyTorch finds no CUDA GPU here: give cpu.")
        tokenizer = AutoTokenizer.from_pretrained(self.model, **trust)
        model = load_causal_lm(self.model, config=config, dtype=self.dtype.value, **trust)
        if self.adapter is not None:
            from lemo_hf.cli.adapter import load_adapter

            # Memory is measured as it is trained.
            model, own = load_adapter(model, self.adapter, tokenizer, is_trainable=True, **trust)
            tokenizer = tokenizer if len(own) == len(tokenizer) else own
        return model.to(place), tokenizer

    def _config(self, length: int | None) -> Any:
        """The config, with positions as the options ask; without one, as an adapter of `lemo train`
        was trained with."""
        asked: dict[str, Any] = {
            "rope_type": self.rope_type,
            "rope_parameters": _json_object(self.rope_parameters) if self.rope_parameters else None,
            "max_position_embeddings": self.max_position_embeddings,
        }
        stretched = length
        if self.adapter is not None:
            from lemo_hf.cli.adapter import check_adapter, settings_of

            check_adapter(self.adapter)
            settings = settings_of(self.adapter)
            if settings is not None and all(value is None for value in asked.values()):
                trained = settings.model()
                asked = {name: getattr(trained, name) for name in asked}
                if trained.rope_type is not None:
                    stretched = settings.data().tokens
        asked |= {"trust_remote_code": self.trust_remote_code, "length": stretched}
        config = prepared_config(self.model, **asked)
        if stretched != length:
            check_length(config, length)
        return config


def takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `ModelOptions`, whose object becomes its first argument.

    A parameter of the command replaces the option of the same name.
    """
    shared = dict(inspect.signature(ModelOptions).parameters)
    _, *own = inspect.signature(command).parameters.values()
    shared |= {parameter.name: parameter for parameter in own if parameter.name in shared}
    own = [parameter for parameter in own if parameter.name not in shared]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = ModelOptions(**{name: values.pop(name) for name in shared})
        command(options, **values)

    first, *rest = shared.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (first, *own, *rest)]
    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


def room_of(memory_gib: float, reserve_gib: float, may_lower: bool = False) -> float:
    """Bytes of a GPU's memory that are left to a step.

    Args:
        memory_gib: Memory of the GPU, GiB.
        reserve_gib: Part of it that is left to CUDA, GiB.
        may_lower: Whether the command has an option ``--reserve-gib``.

    Raises:
        ValueError: There are none.
    """
    if not (math.isfinite(reserve_gib) and reserve_gib >= 0):
        raise ValueError(f"--reserve-gib {reserve_gib:g}: give a number of GiB, 0 or more.")
    if not (math.isfinite(memory_gib) and reserve_gib < memory_gib):
        lower = ", or a lower --reserve-gib" if may_lower and 0 < memory_gib < math.inf else ""
        raise ValueError(
            f"--memory-gib {memory_gib:g}: give the memory of a GPU, more than the "
            f"{reserve_gib:g} GiB that are left to CUDA{lower}."
        )
    return (memory_gib - reserve_gib) * 2**30


def _json_object(text: str) -> dict[str, Any]:
    try:
        wanted = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"--rope-parameters is not valid JSON ({error}): {shortened(text)}"
        ) from error
    if not isinstance(wanted, dict):
        raise ValueError(f"--rope-parameters must be a JSON object, got {shortened(text)}")
    return wanted


def prepared_config(
    name: str,
    *,
    rope_type: str | None = None,
    rope_parameters: dict[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    length: int | None = None,
    **from_pretrained: Any,
) -> Any:
    """A model's config, with the positions that the options ask for.

    Args:
        name: Hub id or directory.
        rope_type: Way in which positions are stretched to ``length`` tokens: linear, yarn or
            dynamic.
        rope_parameters: RoPE parameters, which replace the model's own.
        max_position_embeddings: Number of positions, which replaces the model's own.
        length: Tokens of a row.
        **from_pretrained: Arguments of `AutoConfig.from_pretrained`.

    Raises:
        OSError: There is no such model, or it cannot be reached.
        ValueError: The config is broken, cannot have such positions, or has fewer than ``length``.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    adapted = os.path.join(name, "adapter_config.json")
    if os.path.isfile(adapted) and not os.path.isfile(os.path.join(name, "config.json")):
        base = read_json(adapted).get("base_model_name_or_path")
        raise ValueError(
            f"model {name!r} is an adapter over {base!r}: merge it first (lemo merge), or give "
            f"--model {base} with --adapter {name} where the command takes it."
        )
    try:
        config = AutoConfig.from_pretrained(name, **from_pretrained)
    except OSError as error:
        raise OSError(f"model {name!r}{near_path(name).rstrip('.')}: {error}") from error
    except (StrictDataclassError, KeyError) as error:  # a field's type; RoPE without what it needs
        raise ValueError(f"the config of {name!r}: {error.__cause__ or error}") from error
    change_positions(
        config,
        rope_type=rope_type,
        rope_parameters=rope_parameters,
        max_position_embeddings=max_position_embeddings,
        length=length,
    )
    check_length(config, length)
    return config
