"""Files of JSON lines, compressed or not: read row by row, none larger than memory can hold."""

import bz2
import errno
import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lemo_hf.storage.files import parse_json

# A few MB of an archive can hold a line of many GB.
MOST_BYTES = 2**26
# Of zip files that are encrypted, or compressed in a way that Python does not know, the last.
DAMAGE = (
    *(OSError, gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile),
    RuntimeError,
)
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


class Row(dict[str, Any]):
    """A row that knows where it stands.

    Attributes:
        where: File and line, for messages.
    """

    where: str


def read_file(path: str | os.PathLike, most: int | None = None) -> Iterator[Row]:
    """Rows of a file; what its name ends with says how it is compressed.

    Args:
        path: The file.
        most: Most rows, as of `read_rows`, whose errors it has, too.

    Raises:
        OSError: There is no such file.
        ValueError: It is damaged.
    """
    with damage_told(path), OPENERS.get(Path(path).suffix, open)(path, "rb") as file:
        yield from read_rows(file, path, most)


def read_rows(file: IO[bytes], name: Any, most: int | None = None) -> Iterator[Row]:
    """Objects of a file of JSON lines; empty lines are skipped.

    Args:
        file: Open for reading bytes.
        name: Name in messages.
        most: Bytes that all lines may have together; None if they are not held together.

    Raises:
        ValueError: A line is no JSON object, or there is more than memory should hold.
    """
    number = size = 0
    while line := file.readline(MOST_BYTES + 1):
        number += 1
        size += len(line)
        if most is not None and size > most:
            raise ValueError(f"{name} has more than {most:,} bytes: split it into several files.")
        if len(line) > MOST_BYTES:
            raise ValueError(
                f"{name}, line {number} has more than {MOST_BYTES:,} bytes: write each row in its "
                "own line, and split rows that are longer."
            )
        if line.isspace():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            found = type(values).__name__
            raise ValueError(f"{name}, line {number} must be an object, got {found}.")
        row = Row(values)
        row.where = f"{name}, line {number}"
        yield row


@contextmanager
def damage_told(name: Any) -> Iterator[None]:
    """What reading a compressed file raises where it is damaged becomes a ValueError with its name.

    Decompressors share no base class, and their messages name no file.
    """
    try:
        yield
    except DAMAGE as error:
        # Other errors of the system are the file system's or a network's: a place before the
        # beginning of a file is damage.
        of_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if of_system or (isinstance(error, OSError) and type(error) not in DAMAGE):
            raise
        raise ValueError(
            f"{name} is damaged, or not what its name says ({error}): get it again."
        ) from error
