"""The model and the adapter of `lemo train`."""

from typing import Any

from lemo_hf.cli.loading import load_causal_lm, loading
from lemo_hf.cli.options import prepared_config
from lemo_hf.cli.train_config import ModelSection, Run


def load_base(section: ModelSection, tokens: int | None) -> tuple[Any, Any]:
    """The causal LM on the CPU (Trainer or the launcher moves it), and its tokenizer.

    Raises:
        OSError: There is no such model, or it cannot be reached.
        ValueError: Positions cannot be stretched, or a file of the model is damaged.
    """
    with loading(section.name):
        return _load_base(section, tokens)


def _load_base(section: ModelSection, tokens: int | None) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    shared = {"trust_remote_code": section.trust_remote_code, "revision": section.revision}
    config = prepared_config(
        section.name,
        rope_type=section.rope_type,
        rope_parameters=section.rope_parameters,
        max_position_embeddings=section.max_position_embeddings,
        length=tokens,
        **shared,
    )
    more = (
        {}
        if section.attn_implementation is None
        else {"attn_implementation": section.attn_implementation}
    )
    model = load_causal_lm(section.name, config=config, dtype=section.dtype, **shared, **more)
    return model, AutoTokenizer.from_pretrained(section.name, **shared)


def load_for_training(run: Run) -> tuple[Any, Any]:
    """The model with a new adapter on it, if one is asked for, and its tokenizer."""
    from transformers import set_seed

    set_seed(run.training.seed)  # an adapter's weights are drawn
    model, tokenizer = load_base(run.model, run.data.tokens)
    if run.lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, run.lora)
    return model, tokenizer
