"""PEFT adapters, loaded onto their base model with the tokens they were trained with."""

import logging
import textwrap
import warnings
from pathlib import Path
from typing import Any

from lemo_hf.cli.train_settings import FILE_NAME, read_settings
from lemo_hf.storage.files import EntryNotFound, download, near_path

CONFIG = "adapter_config.json"
logger = logging.getLogger(__name__)

# Of the tensors of an adapter that belong to a table, which dimension is the table's rows.
_ROWS = {
    "weight": 0,
    "base_layer.weight": 0,
    "original_module.weight": 0,
    "lora_embedding_A": 1,
    "lora_B.weight": 0,
}


def load_adapter(
    model: Any, adapter: str, tokenizer: Any, *, is_trainable: bool = False, **shared: Any
) -> tuple[Any, Any]:
    """Load an adapter: the adapted model, and the tokenizer saved beside the adapter, or else the
    base model's.

    Args:
        model: Base model. Its embeddings get as many rows as the adapter was trained with.
        adapter: Hub id or directory.
        tokenizer: Tokenizer of the base model.
        is_trainable: Whether the adapter is to be trained, as for `PeftModel.from_pretrained`.
        **shared: Arguments of the tokenizer's `from_pretrained`.

    Raises:
        ImportError: peft is not installed.
        OSError: There is no such adapter, or it cannot be reached.
        ValueError: The adapter does not belong to this model, or lacks weights that were trained.
    """
    try:
        from peft import PeftConfig, PeftModel
        from peft.utils import get_peft_model_state_dict, load_peft_weights
        from safetensors import SafetensorError
    except ImportError as error:
        raise ImportError(f'adapter {adapter} needs peft: pip install "lemo-hf[peft]".') from error

    config = PeftConfig.from_pretrained(adapter)
    try:
        weights = load_peft_weights(adapter, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"the weights of {adapter} are damaged: {error}") from error
    own = tokenizer_of(adapter, **shared) or tokenizer
    _fit_rows(model, adapter, config, weights, len(own) if len(own) > len(tokenizer) else 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # see merged
        try:
            tuned = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
        except (RuntimeError, UserWarning) as error:
            raise ValueError(_on_other_model(model, adapter, str(error))) from error
    known = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    unknown = [name for name in weights if "lora_" in name and name not in known]
    if unknown:
        raise ValueError(_on_other_model(model, adapter, f"it has no place for {unknown[0]}."))
    return tuned, own


def _on_other_model(model: Any, adapter: str, reason: str) -> str:
    reason = textwrap.shorten(reason, 300, placeholder=" ...")
    return (
        f"{adapter} does not fit {model.config._name_or_path}: give the model that it was trained "
        f"on. {reason}"
    )


def check_adapter(adapter: str) -> None:
    """Raises OSError or ValueError unless there is an adapter of that name."""
    if Path(adapter, "config.json").is_file() and file_of(adapter, CONFIG) is None:
        raise ValueError(
            f"--adapter {adapter} is a whole model, not an adapter: give it as --model alone."
        )
    if file_of(adapter, CONFIG) is None:
        raise ValueError(f"--adapter {adapter} has no {CONFIG}: give a folder with a PEFT adapter.")


def file_of(adapter: str, name: str) -> str | None:
    """Path of a file that lies beside an adapter, or None.

    Raises:
        OSError: There is no such adapter, or it cannot be reached.
    """
    if Path(adapter).is_dir():
        path = Path(adapter, name)
        return str(path) if path.is_file() else None
    try:
        return download(adapter, name, f"give a directory{near_path(adapter).rstrip('.')}")
    except EntryNotFound:
        return None


def settings_of(adapter: str) -> Any:
    """Settings of `lemo train` that lie beside an adapter, or None; errors as of `file_of`."""
    path = file_of(adapter, FILE_NAME)
    return None if path is None else read_settings(path)


def tokenizer_of(adapter: str, **shared: Any) -> Any:
    """The tokenizer that was saved beside an adapter, or None."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from transformers import AutoTokenizer

    try:
        if file_of(adapter, "tokenizer_config.json") is None:
            return None
    except OSError:
        if not HF_HUB_OFFLINE:
            raise
        logger.warning("%s has no tokenizer in the Hub's cache: the base model's is used.", adapter)
        return None
    return AutoTokenizer.from_pretrained(adapter, **shared)


def _fit_rows(model: Any, adapter: str, config: Any, weights: dict[str, Any], tokens: int) -> None:
    """Give embeddings and head the rows that the adapter was trained with.

    Args:
        model: The base model.
        adapter: Name of the adapter.
        config: PEFT's config of the adapter.
        weights: Weights of the adapter, by name.
        tokens: Number of tokens of the adapter's tokenizer, if tokens were added to it; else 0.

    Raises:
        ValueError: Tokens were added, and the adapter lacks their rows.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    there, tied = ends[0].weight.shape[0], model.config.get_text_config().tie_word_embeddings
    names = {name for name, module in model.named_modules() if module in ends}
    found = {
        tensor.shape[_ROWS[name.rpartition(f".{end}.")[2]]]
        for end in names
        for name, tensor in weights.items()
        if name.rpartition(f".{end}.")[2] in _ROWS
    }
    if found:
        rows = max(found)
    elif tokens <= there:
        return
    else:
        rows, lost = tokens, set(range(there, tokens)) - _indices(config, names, tied)
        if lost:
            raise ValueError(
                f"{adapter} adds tokens to the {there:,} of its base model, but lacks the rows of "
                f"{len(lost):,} of them (the first is {min(lost)}): save it again, with "
                "save_pretrained(..., save_embedding_layers=True)."
            )
    if rows != there:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter's come over them


def _indices(config: Any, names: set[str], tied: bool) -> set[int]:
    """Tokens whose rows the adapter stores, both for the embeddings and the head."""
    trained = getattr(config, "trainable_token_indices", None) or []
    if not isinstance(trained, dict):
        return set(trained) if tied else set()
    by_end = [set(trained.get(name.rpartition(".")[2], ())) for name in names]
    return set.union(*by_end) if tied else set.intersection(*by_end)
