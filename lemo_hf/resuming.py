"""What a resumed run goes on from, and how its settings differ from those of the checkpoint."""

import logging
import os
from typing import Any

from lemo_hf.config import LeMoConfig
from lemo_hf.storage.checkpoints import checkpoints, damage, newest_whole_checkpoint
from lemo_hf.storage.files import CONFIG_NAME

logger = logging.getLogger(__name__)

# A predictor's weights are compared; how a pass is run changes no result.
_NOT_COMPARED = ("predictor", "predictor_revision", "sequence_parallel_size", "cuda_graphs")


def resumed_checkpoint(args: Any, asked: str | bool | None) -> str | None:
    """The checkpoint that Trainer goes on from if ``resume_from_checkpoint`` is ``asked``.

    With True it is the newest whole one. If none is whole it is the newest, as Trainer takes it,
    and the log says what that lacks. None: there is none, or nothing is resumed.
    """
    if asked is not True:
        return asked or None
    found = newest_whole_checkpoint(args)
    newest = next(iter(checkpoints(args.output_dir)), None)
    if found is None and newest is not None:
        wrong = damage(newest, args)
        logger.warning("no checkpoint is whole. Resuming the newest, %s: %s.", newest, wrong)
        return str(newest)
    return found


def say_what_changed(config: LeMoConfig, checkpoint: str | os.PathLike) -> None:
    """Log how ``config`` differs from that of a checkpoint."""
    if not os.path.isfile(os.path.join(checkpoint, CONFIG_NAME)):
        logger.warning("%s has no %s: it was not trained with LeMo.", checkpoint, CONFIG_NAME)
        return
    try:
        saved = LeMoConfig.from_pretrained(checkpoint)
    except ValueError as error:  # of a version that allowed it
        logger.warning("the LeMoConfig of %s is not one that is allowed now: %s", checkpoint, error)
        return
    changed = [
        f"{name}={value!r} (was {getattr(saved, name)!r})"
        for name, value in vars(config).items()
        if getattr(saved, name) != value and name not in _NOT_COMPARED
    ]
    if changed:
        logger.warning("resuming %s with another LeMoConfig: %s", checkpoint, "; ".join(changed))
