"""The output directory of `lemo train`: it holds one run, with settings beside the weights they
made."""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lemo_hf.cli.train_settings import FILE_NAME
from lemo_hf.run_card import CARD_NAME, is_ours
from lemo_hf.shown import shown
from lemo_hf.storage.checkpoints import (
    checkpoints,
    damage,
    newest_whole_checkpoint,
    weights_in,
)
from lemo_hf.storage.config_file import check_no_predictor
from lemo_hf.storage.files import CONFIG_NAME, WEIGHTS_NAME, read_text, whole_file

logger = logging.getLogger(__name__)

# What a run leaves there beside weights and checkpoints, and another run may not take for its own.
LEFT = (
    *(FILE_NAME, CONFIG_NAME, WEIGHTS_NAME, "lemo_report.json", "report.html"),
    *("trainer_state.json", "training_args.bin", "adapter_config.json"),
    *("train_results.json", "eval_results.json", "all_results.json"),
)
OF_MODEL = ("config.json", "generation_config.json")  # beside weights that are a whole model's


def starting_point(
    args: Any, resume: bool, overwrite: bool, reads: Iterable[str] = ()
) -> str | None:
    """The checkpoint from which training continues; None: from the beginning.

    Args:
        args: Arguments of the Trainer.
        resume: Whether to go on from the newest whole checkpoint.
        overwrite: Whether to replace the run in the directory.
        reads: Names of what the run reads, such as the base model, as the user gave them.

    Raises:
        ValueError: There is no checkpoint to continue from, or the directory holds another run or
            what this one reads, which would be lost.
    """
    directory, given = args.output_dir, args.resume_from_checkpoint
    if resume and overwrite:
        raise ValueError("--resume goes on and --overwrite starts over: give one of them.")
    if given is not None and (resume or overwrite):
        does = "--resume goes on from the newest" if resume else "--overwrite starts over"
        raise ValueError(
            f"{does}, and training.resume_from_checkpoint={given} names another start: give one "
            "of them."
        )
    if overwrite:
        for name in reads:
            if os.path.exists(name) and _lies_in(name, directory):
                raise ValueError(
                    f"--overwrite would remove {name}, which this run reads, since it lies in the "
                    f"output {directory}: give another --output."
                )
    there = [*weights_in(directory), *checkpoints(directory)]
    if not there and not Path(directory, FILE_NAME).is_file():  # or it is a run's own
        check_no_predictor(directory, None)
    if resume:
        found = newest_whole_checkpoint(args)
        if found is None:
            newest = next(iter(checkpoints(directory)), None)
            state = "no checkpoint"
            if newest is not None:
                state = f"no whole checkpoint ({newest.name}: {damage(newest, args)})"
            way_out = "start over with --overwrite" if there else "leave the flag out"
            raise ValueError(f"--resume: {directory} has {state}: {way_out}.")
        return found
    if there and not overwrite and not (given is not None and _lies_in(given, directory)):
        raise ValueError(
            f"{directory} holds a run already ({there[0].name}): go on with --resume, start over "
            "with --overwrite, which removes it, or give another --output."
        )
    return given


def _lies_in(path: str, directory: str) -> bool:
    """Whether a path is a directory or lies in it, whatever links lead there."""
    inner, outer = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    return inner.is_relative_to(outer)


def check_settings_file(directory: str) -> None:
    """Raises ValueError if the file where the run writes its settings has text of the user's, such
    as comments."""
    path = Path(directory, FILE_NAME)
    if not path.is_file():
        return
    text = read_text(path)
    try:
        own = yaml.safe_dump(yaml.safe_load(text), sort_keys=False) == text
    except yaml.YAMLError:
        own = False
    if not own:
        raise ValueError(
            f"{path} was not written by lemo train, or was changed since, and this run would "
            "replace it by its settings, without comments: give the file another name."
        )


def check_same(checkpoint: str, settings: str) -> None:
    """Raises ValueError if a checkpoint's run trained another model or other parameters than
    ``settings`` (YAML); warns of other rows, which may well be meant."""
    path = Path(checkpoint, FILE_NAME)
    if not path.is_file():  # of a run without `lemo train`
        return
    before, now = (yaml.safe_load(text) for text in (path.read_text(encoding="utf-8"), settings))
    was, wanted = before.get("lora"), now.get("lora")  # None: all parameters
    if was != wanted:
        raise ValueError(
            f"--resume: {checkpoint} was made with lora={shown(was)}, and this run has "
            f"lora={shown(wanted)}: go on with the same, or start over with --overwrite."
        )
    for section, key, was, wanted in _differences(before, now):
        if section == "model":
            raise ValueError(
                f"--resume: {checkpoint} was made with model.{key}={shown(was)}, and this run has "
                f"model.{key}={shown(wanted)}: go on with the same, or start over with --overwrite."
            )
        logger.warning(
            "--resume: %s was made with data.%s=%s, and this run goes on with data.%s=%s.",
            *(checkpoint, key, shown(was), key, shown(wanted)),
        )
    if bool(before["lemo"]) != bool(now["lemo"]):
        logger.warning(
            "--resume: %s was made %s LeMo, and this run goes on %s it.",
            *(checkpoint, *("with" if x["lemo"] else "without" for x in (before, now))),
        )


def _differences(before: dict, now: dict) -> Iterator[tuple[str, str, Any, Any]]:
    """Section, key and both values of what the weights or the rows follow from."""
    for section, free in (("model", ("attn_implementation", "trust_remote_code")), ("data", ())):
        was, wanted = before.get(section) or {}, now[section]
        for key in [key for key in wanted if key in was and key not in free]:
            if key.startswith(("eval_", "max_eval_")) or was[key] == wanted[key]:
                continue
            if (section, key) == ("model", "name") and _same_folder(was[key], wanted[key]):
                continue
            yield section, key, was[key], wanted[key]


def _same_folder(one: str, other: str) -> bool:
    return os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other)


def of_run(directory: str) -> list[Path]:
    """The files and the checkpoints of the run in ``directory``."""
    names, weights = list(LEFT), weights_in(directory)
    names += [CARD_NAME] if is_ours(directory) else []
    names += OF_MODEL if any(not path.name.startswith("adapter") for path in weights) else ()
    files = [path for path in (Path(directory, name) for name in names) if path.is_file()]
    return [*files, *weights, *checkpoints(directory)]


def clear(directory: str) -> None:
    """Remove the run in ``directory``; files of other kinds stay."""
    for path in of_run(directory):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_settings(directory: str, settings: str) -> None:
    """Write the settings into the directory where the weights that they make are about to be
    written.

    Weights of other settings are removed first: whenever the process ends, no settings stand beside
    weights that they did not make.
    """
    path = Path(directory, FILE_NAME)
    if path.is_file() and path.read_text(encoding="utf-8") == settings:
        return
    for weights in weights_in(directory):
        weights.unlink()
    os.makedirs(directory, exist_ok=True)
    with whole_file(path) as part:
        Path(part).write_text(settings, encoding="utf-8")


def write_first_settings(directory: str, settings: str) -> None:
    """Write the settings at the start of a run, unless the directory holds weights that they did
    not make."""
    if not weights_in(directory):
        write_settings(directory, settings)
