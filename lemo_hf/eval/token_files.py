"""Files of token ids: 16-bit numbers one after the other and nothing else, as LongLoRA's .bin."""

import os
from pathlib import Path

import numpy as np

from lemo_hf.storage.files import near_path

DTYPE = np.dtype("<u2")  # unsigned, 16 bit, little-endian
CHUNK = 2**24  # tokens looked at at a time


def read_token_file(path: str | os.PathLike, vocab_size: int | None = None) -> np.ndarray:
    """The tokens of a file, in memory only where they are read.

    The format has no header. So nothing tells which tokenizer made a file; ``vocab_size`` finds
    most files that are not the model's.

    Args:
        path: The file.
        vocab_size: Vocabulary of the model; None: ids are not looked at.

    Returns:
        ``[N]`` uint16, read-only, mapped to the file: one document, or many in one stream.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be a file of 16-bit numbers, is empty, or has an id that the
            vocabulary has not.
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
