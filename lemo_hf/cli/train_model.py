"""The model and the adapter of `lemo train`."""

import warnings
from typing import Any

from lemo_hf.cli.loading import load_causal_lm, loading
from lemo_hf.cli.options import prepared_config
from lemo_hf.cli.train_sections import ModelSection, Run


def load_base(section: ModelSection, tokens: int | None) -> tuple[Any, Any]:
    """The causal LM on the CPU (Trainer or the launcher moves it), and its tokenizer.

    Raises:
        OSError: There is no such model, or it cannot be reached.
        ValueError: Positions cannot be stretched, or a file of the model is damaged.
    """
    config = load_config(section, tokens)
    tokenizer = load_tokenizer(section)
    return load_weights(section, config), tokenizer


def load_config(section: ModelSection, tokens: int | None) -> Any:
    """The model's config, with the positions that were asked for; errors as of `load_base`."""
    with loading(section.name):
        return prepared_config(
            section.name,
            rope_type=section.rope_type,
            rope_parameters=section.rope_parameters,
            max_position_embeddings=section.max_position_embeddings,
            length=tokens,
            **_shared(section),
        )


def load_tokenizer(section: ModelSection) -> Any:
    """The tokenizer; errors as of `load_base`."""
    from transformers import AutoTokenizer

    with loading(section.name):
        return AutoTokenizer.from_pretrained(section.name, **_shared(section))


def load_weights(section: ModelSection, config: Any) -> Any:
    """The causal LM of a config that `load_config` gave; errors as of `load_base`."""
    with loading(section.name):
        return load_causal_lm(
            section.name,
            config=config,
            dtype=section.dtype,
            **_shared(section),
            **attention_of(section),
        )


def attention_of(section: ModelSection) -> dict[str, str]:
    """``attn_implementation`` as an argument, if it was asked for."""
    name = section.attn_implementation
    return {} if name is None else {"attn_implementation": name}


def load_for_training(run: Run, config: Any) -> Any:
    """The model with a new adapter on it, if one is asked for."""
    from transformers import set_seed

    set_seed(run.training.seed)  # an adapter's weights are drawn
    return adapted(load_weights(run.model, config), run.lora)


def adapted(model: Any, lora: Any) -> Any:
    """The model with a new adapter on it; unchanged if ``lora`` is None."""
    if lora is None:
        return model
    from peft import get_peft_model

    with warnings.catch_warnings():  # PEFT asks by the name that transformers 5.23 warns of
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, lora)


def _shared(section: ModelSection) -> dict[str, Any]:
    return {"trust_remote_code": section.trust_remote_code, "revision": section.revision}
