"""Decides when kernels launch, and which modules they may bypass.

Tensors on a CUDA device use the Triton kernel, whose errors are raised. Tensors elsewhere, and on
GPUs for which Triton has no compiler, use the plain PyTorch definition at the beginning of each
kernel file.
"""

import os
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

OLDEST = (8, 0)  # compute capability (Ampere); Triton makes no code for Volta and Turing
DEVICES = {"cuda"}  # types of device whose tensors take kernels
WIDENING = {"cuda"}  # those whose products of 16-bit numbers may come out in fp32
PLAIN = {nn.Parameter}  # types of a weight that is neither sharded nor quantised


def use_triton(x: Tensor) -> bool:
    """Whether functions of ``x`` launch Triton kernels."""
    return x.device.type in DEVICES


@cache
def settle(device: str) -> str | None:
    """Take kernels off a machine whose GPUs cannot run them; why they are off, None if they run.

    ``LEMO_TRITON=0`` in the environment takes them off any GPU. ``device`` is the type of the
    model's: a GPU that it does not use is not asked, since a process that has asked cannot fork.
    """
    why = None
    if device != "cuda":
        return why
    if os.environ.get("LEMO_TRITON") == "0":
        why = "LEMO_TRITON=0"
    else:
        count = torch.cuda.device_count()
        found = min(torch.cuda.get_device_capability(index) for index in range(count))
        if found < OLDEST:
            why = "compute capability {}.{}, Triton needs {}.{}".format(*found, *OLDEST)
    if why is not None:
        DEVICES.discard("cuda")
        WIDENING.discard("cuda")
    return why


def untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else.

    Otherwise it must be called: hooks (accelerate, DeepSpeed, FSDP, a user's) or a replaced forward
    (Liger) rely on it.
    """
    # Asked a dozen times a layer and step, so no loop and no lookup by nn.Module.
    own = vars(module)
    return not (
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _has_any_global_hook()
    )


def runs_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` runs the forward that transformers gave its class."""
    # Under mixed precision accelerate puts a wrapper there, and keeps what it calls by this name.
    forward = vars(module).get("_original_forward", vars(module).get("forward"))
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return False
    return is_of_transformers(type(module).forward)


@cache
def is_of_transformers(function: Any) -> bool:
    """Whether transformers wrote ``function`` and all that wraps it."""
    while function is not None:  # who wraps it may call itself by its name and module
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def sharded(module: nn.Module) -> bool:
    """Whether a call of the module gathers parameters from other processes (FSDP2, ZeRO-3).

    Then all processes must call it equally often, or each waits for the others forever.
    """
    # By the marks they leave: importing FSDP2 to ask takes a second, DeepSpeed may not be there.
    if any(hasattr(part, "set_requires_gradient_sync") for part in module.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def row_block(width: int) -> dict[str, int]:
    """Block size and number of warps of a program that holds one row of ``width`` elements in
    registers.

    Raises:
        ValueError: A row does not fit a program.
    """
    block = triton.next_power_of_2(width)
    if block > 65536:
        raise ValueError(f"rows of {width} elements do not fit a Triton program; the most is 65536")
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
