"""A second model on the same weights that runs Liger's kernels, beside one that does not.

Liger patches a model's modules for good, and two names of transformers' Llama module. The modules
here are the twin's own; the names hold only while the twin runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from model_shapes import bare_model, restore_buffers, with_adapters
from torch import nn
from transformers.models.llama import modeling_llama

_PATCHED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


def share_weights(twin: nn.Module, model: nn.Module) -> None:
    """Let ``twin`` hold the very parameters of ``model``."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        twin.get_submodule(module)._parameters[leaf] = parameter
    for name, parameter in twin.named_parameters():
        if parameter.is_meta:
            raise RuntimeError(f"{name} has no values")


def liger_twin(model: nn.Module, title: str) -> nn.Module:
    """The PEFT ``model`` once more, with all of Liger's Llama kernels.

    Raises:
        ImportError: Liger is not installed.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    config = type(model.config)(**model.config.to_dict())
    config._attn_implementation = model.config._attn_implementation
    inner = bare_model(config)
    restore_buffers(inner, config, next(model.parameters()).device)
    with torch.device("meta"):
        twin = with_adapters(inner, title)
    share_weights(twin, model)
    with _names_kept():
        # Its defaults: rotary, RMSNorm, SwiGLU, and the fused linear cross-entropy.
        apply_liger_kernel_to_llama(model=twin.get_base_model())
    return twin.train()


@contextmanager
def liger_names() -> Iterator[None]:
    """Let Llama's attention call Liger's rotary kernel."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    with patch.object(modeling_llama, "apply_rotary_pos_emb", liger_rotary_pos_emb):
        yield


@contextmanager
def _names_kept() -> Iterator[None]:
    kept = {name: getattr(modeling_llama, name) for name in _PATCHED}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(modeling_llama, name, value)
