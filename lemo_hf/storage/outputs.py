"""Places for results: whether they can be written, checked before the work, and whether another run
writes there."""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from lemo_hf.storage.files import CONFIG_NAME, read_json

logger = logging.getLogger(__name__)

# By these a directory is known to hold a model, an adapter, a tokenizer or a predictor.
_OF_MODELS = ("config.json", "adapter_config.json", "tokenizer_config.json", CONFIG_NAME)
LOCK_NAME = "_lock"  # Trainer's pushes leave it out
SAMPLE = b"\0" * 65536  # what a full disk has no room for


def check_output(
    path: str | os.PathLike,
    name: str,
    *,
    directory: bool = False,
    inputs: Iterable[str | os.PathLike] = (),
    ending: str | None = None,
) -> None:
    """Check by a trial that ``path`` can be written later. Nothing is left of the trial.

    Args:
        path: File or directory; it and the directories above it may be missing.
        name: Name of the path for the user, such as ``"--output"``.
        directory: Whether it will be a directory.
        inputs: What the command reads, some of it not files: no output may replace it.
        ending: How the names of such files end: one of another name is not replaced.

    Raises:
        OSError: It cannot be written; the message says why.
        ValueError: It would replace what the command reads, or a file of another kind.
    """
    if os.path.isfile(path):
        for read in inputs:
            if os.path.isfile(read) and os.path.samefile(read, path):
                raise ValueError(
                    f"{name} {os.fspath(path)} would replace {os.fspath(read)}, which is read: "
                    "give another name."
                )
        if ending is not None and not os.fspath(path).lower().endswith(ending):
            raise ValueError(
                f"{name} {os.fspath(path)} would replace a file that is no {ending}: give a name "
                f"that ends in {ending}, or remove the file."
            )
    target = os.path.realpath(path)
    try:
        if os.path.exists(path):
            if os.path.isdir(path) is not directory:
                raise OSError("it is a file" if directory else "it is a directory")
            if not os.access(path, os.W_OK):
                raise OSError("it is read-only")
            if not directory and not os.path.isfile(path):
                return  # a device or a pipe, such as /dev/stdout
        above = target if directory else os.path.dirname(target)
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above):
            raise OSError(f"{above} is not a directory")
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(SAMPLE)
            file.flush()
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{name} {os.fspath(path)} cannot be written: {why}.") from error


def check_replaces_no_model(path: str | os.PathLike, name: str, results: Iterable[str]) -> None:
    """Raises ValueError if ``path`` is a JSON file that belongs to the model, the adapter or the
    predictor in its directory.

    Args:
        path: Where a result will be written; there may be no such file.
        name: Name of the path for the user, such as ``"--output"``.
        results: Keys of such a result: a file that has them is an earlier one.
    """
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isfile(path) or not any(
        os.path.isfile(os.path.join(folder, of_model)) for of_model in _OF_MODELS
    ):
        return
    try:
        there = read_json(path)
    except ValueError:  # JSON of another kind, or damaged
        there = {}
    if not set(results) <= there.keys():
        raise ValueError(
            f"{name} {os.fspath(path)} would replace a file that belongs to the model in "
            f"{folder}: give another name."
        )


@contextmanager
def only_run(directory: str | os.PathLike) -> Iterator[None]:
    """Within this context no other run writes to ``directory``, which is made if missing.

    Raises:
        ValueError: Another run writes there.
    """
    os.makedirs(directory, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(os.path.join(directory, LOCK_NAME), wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"another run is writing to {os.fspath(directory)}: wait for its end, or give "
                "another directory."
            ) from error
        yield


@contextmanager
def locked(path: str | os.PathLike, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Within this context a directory, or a file that is made for this, is locked against other
    processes.

    The system releases the lock when the process ends, however it ends. If the file system or the
    system has no such locks, nothing is locked.

    Args:
        path: Directory or file to lock.
        shared: Whether others may hold a shared lock too.
        wait: Whether to wait until others release it.

    Raises:
        BlockingIOError: Another process holds the lock, and ``wait`` is False.
    """
    if fcntl is None:
        yield
        return
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            logger.info("%s cannot be locked: %s", path, error)
        yield
    finally:
        os.close(descriptor)
