"""Files of token ids: nothing but 16-bit numbers one after the other, as LongLoRA's .bin files."""

import os
from pathlib import Path

import numpy as np

from lemo_hf.storage.files import near_path

DTYPE = np.dtype("<u2")  # unsigned, 16 bit, little-endian
CHUNK = 2**24  # tokens looked at at a time


def read_token_file(path: str | os.PathLike, vocab_size: int | None = None) -> np.ndarray:
    """The tokens of a file, mapped, so that only what is read takes memory.

    The format has no header, so nothing tells which tokenizer made a file. ``vocab_size`` finds
    most files that were not made with the model's.

    Args:
        path: Path of the file.
        vocab_size: Size of the model's vocabulary; None: ids are not checked.

    Returns:
        ``[N]`` uint16, read-only, mapped to the file: one document, or many in one stream.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot hold 16-bit numbers, is empty, or has an id outside the
            vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}{near_path(path)}")
    size = path.stat().st_size
    if size == 0 or size % DTYPE.itemsize:
        raise ValueError(
            f"{path} has {size} bytes: a file of 16-bit token ids has an even number of bytes, and "
            "is not empty."
        )
    tokens = np.memmap(path, dtype=DTYPE, mode="r")
    for start in range(0, len(tokens) if vocab_size is not None else 0, CHUNK):
        chunk = tokens[start : start + CHUNK]
        place = int(chunk.argmax())
        if chunk[place] >= vocab_size:
            raise ValueError(
                f"{path} has the token {chunk[place]} at {start + place}, the model's vocabulary "
                f"has {vocab_size}: use a file made with the model's tokenizer."
            )
    return tokens
