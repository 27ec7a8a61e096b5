"""Files of JSON lines, compressed or not, read row by row, with limits that memory can hold."""

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
    """A row that knows its place in a file.

    Attributes:
        where: Name of the file and number of the line, for messages.
    """

    where: str


def read_file(path: str | os.PathLike, most: int | None = None) -> Iterator[Row]:
    """Rows of a file; the end of its name says how it is compressed.

    Args:
        path: Path of the file.
        most: Greatest number of bytes, as for `read_rows`, whose errors it raises too.

    Raises:
        OSError: There is no such file.
        ValueError: The file is damaged.
    """
    with damage_told(path), OPENERS.get(Path(path).suffix, open)(path, "rb") as file:
        yield from read_rows(file, path, most)


def read_rows(file: IO[bytes], name: Any, most: int | None = None) -> Iterator[Row]:
    """Objects of a file of JSON lines; empty lines are skipped.

    Args:
        file: File that is open for reading bytes.
        name: Name of the file in messages.
        most: Greatest number of bytes of all lines together; None if the caller does not keep them
            all.

    Raises:
        ValueError: A line is not a JSON object, or there are too many bytes.
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
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number} is not UTF-8 text ({error}): save the file as UTF-8."
            ) from error
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
    """Within this context errors of reading a damaged compressed file become a ValueError with its
    name.

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
