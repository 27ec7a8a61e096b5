"""Trainer's checkpoints, and which of them are complete."""

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lemo_hf.storage.files import read_json

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"  # what Trainer writes last
WEIGHTS = ("adapter_model", "model", "pytorch_model")  # how their names begin
TORCH = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|.*model).*\.(pt|pth|bin)")


def checkpoints(directory: str | os.PathLike) -> list[Path]:
    """The checkpoints in a Trainer's output directory, the newest first."""
    folder = Path(directory)
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    numbered = [path for path in found if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(numbered, key=lambda path: int(path.name[11:]), reverse=True)


def weights_in(directory: str | os.PathLike) -> list[Path]:
    """Files of weights of a model or an adapter, by name, also those that say where shards lie."""
    folder = Path(directory)
    if not folder.is_dir():
        return []
    kinds = (".safetensors", ".bin", ".index.json")
    found = [path for path in folder.iterdir() if path.name.startswith(WEIGHTS)]
    return sorted(path for path in found if path.is_file() and path.name.endswith(kinds))


def newest_whole_checkpoint(args: Any) -> str | None:
    """The newest checkpoint from which a Trainer with these arguments can continue, or None.

    The log warns of newer ones, and says what is wrong with them.
    """
    skipped: dict[Path, str] = {}
    for checkpoint in checkpoints(args.output_dir):
        wrong = damage(checkpoint, args)
        if wrong is None:
            for path, why in skipped.items():
                logger.warning("%s is incomplete and was skipped: %s.", path, why)
            return str(checkpoint)
        skipped[checkpoint] = wrong
    return None


def damage(checkpoint: Path, args: Any) -> str | None:
    """What is missing from a checkpoint, after a killed process or a full disk, in words; None if
    it is complete.

    Only headers and ends of files are read. Folders, which FSDP and DeepSpeed write, are not
    checked.
    """
    names = sorted(path.name for path in checkpoint.iterdir())
    if STATE_NAME not in names:
        return f"it has no {STATE_NAME}, which is written last"
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.is_file():
                _check(path)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} is damaged ({error})"
    missing = _missing(checkpoint, names, args.save_only_model)
    return f"it has no {missing}" if missing else None


def _check(path: Path) -> None:
    """Raises an error if a file was not written to its end."""
    if path.suffix == ".json":
        with open(path, encoding="utf-8") as file:
            json.load(file)
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # compares the header with the file's size
            pass
    elif TORCH.fullmatch(path.name):
        with zipfile.ZipFile(path):  # looks for the table at the end
            pass


def _missing(checkpoint: Path, names: list[str], only_model: bool) -> str | None:
    """A missing file without which Trainer would continue differently."""
    if "latest" in names:  # DeepSpeed's, which names a folder that holds all
        return None
    for index in [name for name in names if name.endswith(".index.json")]:
        shards = set(read_json(checkpoint / index).get("weight_map", {}).values())
        if lost := sorted(shards - set(names)):
            return lost[0]
    adapters = checkpoint.glob("*/adapter_model.*")  # of a model with several
    if not any(name.startswith(WEIGHTS) for name in names) and not any(adapters):
        return "weights"
    if only_model:
        return None
    kept = ("optimizer", "scheduler.pt", "rng_state")  # FSDP's optimizer is a folder
    return next((part for part in kept if not any(name.startswith(part) for name in names)), None)
