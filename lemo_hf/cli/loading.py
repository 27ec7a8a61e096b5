"""Damaged files of a model: what transformers, tokenizers and safetensors raise, in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from lemo_hf.shown import shortened


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Tell what loading the model ``name`` fails with.

    Raises:
        ValueError: In the place of errors that name neither the model nor what is wrong with it.
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
            f"model {name!r} cannot be loaded, a file of it may be damaged ({what}): get it again."
        ) from error
