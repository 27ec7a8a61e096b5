"""Decides whether a kernel may replace a module's own forward, or the module must be called.

A kernel reads a norm's weight, or calls the Linear modules inside an MLP, and skips the call of the
module around them. This is right only if the module is transformers' own and nothing is hooked to
its call (`untouched`).
"""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from transformers.activations import ACT2FN

from lemo_hf.core.family import Family
from lemo_hf.core.lora import linear_of
from lemo_hf.kernels.gated_activation import gated_activation
from lemo_hf.kernels.launch import runs_own_forward, sharded, untouched
from lemo_hf.kernels.norm import KINDS, Norm

_ACTIVATIONS = {
    type(ACT2FN[name]): kernel
    for name, kernel in (
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
    )
}


def norm_of(module: nn.Module | None, kind: str) -> Norm | None:
    """A norm module as the kernels need it; None if the module itself must be called."""
    if module is None or kind not in KINDS or getattr(module, "weight", None) is None:
        return None
    pytorchs = kind == "layer" and type(module) is nn.LayerNorm and untouched(module)
    if not (pytorchs or _is_stock(module)):
        return None
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    weight = cast(Tensor, module.weight)
    return Norm(kind, weight, getattr(module, "bias", None), cast(float, eps))


def final_norm(model: nn.Module, family: Family) -> Norm | None:
    """The norm between the last layer and the head, if the kernels support it and nothing else is
    there."""
    inner = model.get_submodule(family.layers.rpartition(".")[0])
    if getattr(inner, "project_out", None) is not None:  # OPT-350m: a projection follows
        return None
    name = family.final_norm.rpartition(".")[2]
    norm = norm_of(getattr(inner, name, None), family.norm)
    return None if norm is None or sharded(getattr(inner, name)) else norm


def gated_activations(layer: nn.Module, family: Family) -> Callable[[Tensor], Tensor] | None:
    """The input of a gated MLP's last Linear, computed by the Linears before it; None if the MLP
    must be called."""
    mlp = getattr(layer, family.mlp[0])
    activation = _ACTIVATIONS.get(type(getattr(mlp, family.activation, None)))
    projections = [getattr(mlp, name, None) for name in family.gate]
    found = [projection for projection in projections if projection is not None]
    if activation is None or not found or len(found) < len(projections):
        return None
    if not (_is_stock(mlp) and untouched(getattr(mlp, family.activation))):
        return None

    linears = [linear_of(projection) for projection in found]

    def run(hidden: Tensor) -> Tensor:
        parts = [linear(hidden) for linear in linears]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
        return gated_activation(gate, up, activation)

    return run


def _is_stock(module: nn.Module) -> bool:
    """Whether a call of the module does what transformers wrote, and nothing else."""
    known = type(module).__module__.startswith("transformers.models.")
    return known and untouched(module) and runs_own_forward(module)
