"""The two files of a predictor: written together, and checked before use.

``lemo_config.json`` holds the recommended `LeMoConfig` and, under ``"predictor"``, the facts about
the predictors; ``lemo_predictors.safetensors`` holds their weights. The first names the SHA-256 of
the second, so that a damaged file, or one of another save, is found. A save writes new weights
beside the old ones, under a name with their SHA-256, then replaces the config, then the old
weights. One rename, that of the config, makes both new files visible.
"""

import hashlib
import math
import os
import re
from typing import Any

import torch
from torch import Tensor

from lemo_hf.config import LeMoConfig
from lemo_hf.shown import shown
from lemo_hf.storage.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    read_json,
    remove_abandoned,
    whole_file,
    write_json,
)
from lemo_hf.storage.outputs import locked

# Raised when another version of lemo-hf would misread the section.
FORMAT = 2
_DTYPES = ("F32", "F16", "BF16")
_AGAIN = "Download it again (force_download=True), or save the predictor again."
# What is often found under a safetensors name, by its first bytes.
_NO_SAFETENSORS = {
    b"PK\x03\x04": "is a pickle of torch.save, which is never loaded since it can run any code. "
    "Its author must save it with LeMoPredictor.save_pretrained.",
    b"\x80": "is a pickle, which is never loaded since it can run any code. Its author must save "
    "it with LeMoPredictor.save_pretrained.",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run `git lfs pull`.",
}


def write_predictor_files(
    directory: str | os.PathLike,
    lemo_config: LeMoConfig,
    section: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Write both files or neither, whatever ends the process and whoever else writes there.

    Raises:
        TypeError: ``section`` holds a value that JSON cannot write.
    """
    from safetensors.torch import save

    os.makedirs(directory, exist_ok=True)
    config_path, weights_path = (os.path.join(directory, x) for x in (CONFIG_NAME, WEIGHTS_NAME))
    data = save(tensors, metadata={"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    values = lemo_config.to_dict()
    del values["predictor_revision"]
    values["policy"] = "predictor"
    values["predictor"] = {"format": FORMAT, "sha256": sha256, **section}
    with locked(directory):
        _end_save(config_path, weights_path)  # one that was killed
        remove_abandoned(directory, WEIGHTS_NAME)
        replaces = os.path.isfile(weights_path)
        with whole_file(config_path) as new_config:
            write_json(new_config, values)
            new_path = _beside(weights_path, sha256) if replaces else weights_path
            with whole_file(new_path) as new_weights, open(new_weights, "wb") as file:
                file.write(data)
        _end_save(config_path, weights_path)


def named_weights(weights_path: str, sha256: Any) -> str:
    """The file of the weights that a config names; until a save has ended it lies beside the old
    one."""
    if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256):
        beside = _beside(weights_path, sha256)
        if os.path.isfile(beside):
            return beside
    return weights_path


def _beside(weights_path: str, sha256: str) -> str:
    directory, name = os.path.split(weights_path)
    return os.path.join(directory, f"_{name}.{sha256[:16]}.part")


def _end_save(config_path: str, weights_path: str) -> None:
    """Move the weights that the config names to their place, if they lie beside it."""
    try:
        sha256 = read_section(config_path)["sha256"]
    except (OSError, ValueError, KeyError):
        return  # it means none
    named = named_weights(weights_path, sha256)
    if named != weights_path:
        os.replace(named, weights_path)


def read_section(path: str | os.PathLike) -> dict[str, Any]:
    """The section of a ``lemo_config.json`` on the predictors beside it.

    Raises:
        ValueError: The file is not JSON, has no section on predictors, or has another version's
            format.
    """
    values = read_json(path)
    section = values.get("predictor")
    if isinstance(section, str):
        raise ValueError(
            f"{path} holds no predictor but refers to {shown(section)}: load the predictor from "
            "there."
        )
    if not isinstance(section, dict):
        raise ValueError(
            f"{path} has no object under the key 'predictor' (got {shown(section)}): it holds a "
            "LeMoConfig alone. LeMoPredictor.save_pretrained writes a file with a predictor."
        )
    found = section.get("format")
    if type(found) is not int or found != FORMAT:
        older = type(found) is int and found < FORMAT
        way_out = "train it again (lemo train-predictor)" if older else "pip install -U lemo-hf"
        raise ValueError(
            f"{path} has predictor format {shown(found)}, written by lemo_hf "
            f"{shown(values.get('lemo_version'))}; this version reads {FORMAT}: {way_out}."
        )
    return section


def read_tensors(
    path: str | os.PathLike, shapes: dict[str, tuple[int, ...]], sha256: str
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, in fp32 and memory of their own.

    Args:
        path: Path of the file.
        shapes: Shape of every tensor that the file must hold, and no other. They are compared with
            its header, so that nothing is allocated for a config that does not belong to the file.
        sha256: SHA-256 of the file.

    Raises:
        ValueError: The file is damaged, is a pickle, or holds other names, shapes, dtypes or
            values.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        start = file.read(32)
    for beginning, what in _NO_SAFETENSORS.items():
        if start.startswith(beginning) and start[8:9] != b"{":  # where a safetensors header begins
            raise ValueError(f"{path} {what}")
    try:
        with safe_open(path, "pt") as file:
            _check_header(path, file, shapes)
            if (found := _sha256(path)) != sha256:
                raise ValueError(
                    f"{path} has sha256 {found[:12]}…, but {CONFIG_NAME} beside it names "
                    f"{str(sha256)[:12]}…: it is damaged, or from another save. {_AGAIN}"
                )
            tensors = {name: file.get_tensor(name).float().clone() for name in shapes}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). {_AGAIN}"
        ) from error
    for name, tensor in tensors.items():
        wrong = math.prod(tensor.shape) - int(torch.isfinite(tensor).sum())
        if wrong:
            raise ValueError(
                f"{path}: {wrong} of {tensor.numel()} values of {name!r} are NaN or infinite: the "
                "training of this predictor diverged. Train it again with a lower learning rate."
            )
    return tensors


def _check_header(path: str | os.PathLike, file: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    names = set(file.keys())
    for what, some in (("lacks", set(shapes) - names), ("has unexpected", names - set(shapes))):
        if some:
            raise ValueError(
                f"{path} {what} {len(some)} tensors, such as {shown(min(some))}: it does not "
                f"belong to the {CONFIG_NAME} beside it. {_AGAIN}"
            )
    for name, shape in shapes.items():
        header = file.get_slice(name)
        if header.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{path}: {name!r} has dtype {header.get_dtype()}, expected one of {_DTYPES}. "
                f"{_AGAIN}"
            )
        if tuple(header.get_shape()) != tuple(shape):
            raise ValueError(
                f"{path}: {name!r} has shape {tuple(header.get_shape())}, but by the sizes in "
                f"{CONFIG_NAME} beside it {tuple(shape)}: they do not belong together. {_AGAIN}"
            )


def _sha256(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
