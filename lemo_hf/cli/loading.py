"""Loading of models: damaged files are reported in one line, and missing weights are refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lemo_hf.shown import shortened


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Report in one line why loading the model ``name`` fails.

    Raises:
        ValueError: Loading failed with an error that names neither the model nor the cause.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        said = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
        if said or type(error).__name__ == "OutOfMemoryError":
            raise
        what = shortened(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ValueError(
            f"model {name!r} cannot be loaded; one of its files may be damaged ({what}): get it "
            "again."
        ) from error


def load_causal_lm(name: str, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, without weights drawn at random for missing ones.

    Raises:
        ValueError: The checkpoint lacks weights. A head that is tied to the embeddings may be
            missing.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        count = "1 weight" if len(missing) == 1 else f"{len(missing)} weights"
        raise ValueError(
            f"model {name!r} has no values for {count} of {type(model).__name__}, which would be "
            f"random: {shortened(', '.join(missing))}. Name a checkpoint of this class. A "
            "multimodal checkpoint stores its language model under other names: name a checkpoint "
            "of the text model alone."
        )
    return model
