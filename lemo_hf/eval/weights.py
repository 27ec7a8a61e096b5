"""Checksums of a model's weights, cheap enough for the start of every run."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_checksum(model: nn.Module) -> str:
    """16 hexadecimal digits of all parameters: names, dtypes, shapes and the sums of their bits.

    Sums of integers are the same in any order and on any device. Weights that are offloaded (on the
    meta device) count by name and shape alone.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        bits = parameter.detach()
        total: int | float = 0
        if not bits.is_meta:
            total = bits.view(_INTEGERS[bits.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{name} {bits.dtype} {tuple(bits.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]


def model_checksum(model: Any) -> str:
    """16 hexadecimal digits of all that decides what a transformers model computes.

    These are its weights, its config (without its origin and version), and the scaling of its
    adapters.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures"):
        config.pop(name, None)
    parts = [weights_checksum(model), adapter_scaling(model), config]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def adapter_scaling(model: nn.Module) -> str | None:
    """16 hexadecimal digits of the factors in PEFT's layers, which are not parameters.

    None if there is no such layer.
    """
    scaling = {
        name: module.scaling
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    text = json.dumps(scaling, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if scaling else None
