"""What `--overwrite` replaces: it waits beside the new run until that has made its first step."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lemo_hf.cli.train_folder import clear, of_run
from lemo_hf.cli.train_settings import FILE_NAME
from lemo_hf.storage.outputs import only_run

logger = logging.getLogger(__name__)

# Trainer's pushes leave names out that begin so.
ASIDE = "_replaced"
REMOVED = "_removed"  # it may lack files already, so nothing is put back from it


@contextmanager
def replaced(directory: str, trainer: Any) -> Iterator[None]:
    """Within this context a new run replaces the one in ``directory``.

    The old run is removed at the first step of the optimizer, and put back if the context ends
    without one. If the process is killed before, `put_back` does that when the next run starts.
    """
    first_step = _FirstStep(directory)
    trainer.add_callback(first_step)
    aside = Path(directory, ASIDE)
    try:
        _set_aside(directory)
        try:
            yield
        finally:
            if aside.is_dir():
                clear(directory)  # what the new run has written
    finally:
        trainer.remove_callback(first_step)
        if aside.is_dir():
            _move_back(directory)
            logger.warning("No step was made: the run that was in %s is there again.", directory)


def put_back(args: Any) -> None:
    """Put back what a run that was killed before its first step would have replaced.

    Raises:
        ValueError: Another run is writing to the output directory.
    """
    directory = args.output_dir
    with args.main_process_first(local=False, desc="putting back what was to be replaced"):
        aside, removed = Path(directory, ASIDE), Path(directory, REMOVED)
        if args.process_index or not (aside.is_dir() or removed.is_dir()):
            return
        with only_run(directory):
            shutil.rmtree(removed, ignore_errors=True)
            if aside.is_dir():
                _move_back(directory)
                logger.warning(
                    "%s: --overwrite was about to replace the run there and was ended before its "
                    "first step: that run is there again.",
                    directory,
                )


class _FirstStep(TrainerCallback):
    """Removes the old run at the first step of the new."""

    def __init__(self, directory: str):
        self.directory = directory

    def on_step_end(self, *_: Any, **__: Any) -> None:
        aside, removed = Path(self.directory, ASIDE), Path(self.directory, REMOVED)
        if aside.is_dir():
            os.replace(aside, removed)  # a process that is killed while it removes says so
            shutil.rmtree(removed)


def _set_aside(directory: str) -> None:
    """Move the run, its settings first: where they are not aside, the run had none."""
    found = of_run(directory)
    if not found:
        return
    aside = Path(directory, ASIDE)
    aside.mkdir()
    for path in sorted(found, key=lambda path: path.name != FILE_NAME):
        os.replace(path, aside / path.name)


def _move_back(directory: str) -> None:
    """Move the run back, its settings last."""
    aside, settings = Path(directory, ASIDE), Path(directory, FILE_NAME)
    names = sorted(os.listdir(aside), key=lambda name: name == FILE_NAME)
    if names and FILE_NAME not in names:
        settings.unlink(missing_ok=True)  # of the new run
    for name in names:
        os.replace(aside / name, Path(directory, name))
    aside.rmdir()
