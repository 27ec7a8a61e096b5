"""PEFT's LoRA with its scaling and its sum inside the second product.

``W x + scaling * B (A x)`` takes PEFT two passes over the result for the scaling and the sum, and
one over its gradient. As one `torch.addmm` into the result of ``W x`` there are none. At 64K tokens
that is some 2 % of a step of Llama-3 8B.

Source: LoRA, arXiv:2106.09685.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lemo_hf.kernels.launch import untouched


def linear_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What to call in place of a linear of the model: `module` itself unless it is plain LoRA."""
    parts = _plain_lora(module)
    if parts is None:
        return module
    base, first, second, scaling = parts

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = base(rows)
        if first.weight.dtype != out.dtype and not torch.is_autocast_enabled(x.device.type):
            return module(x)  # PEFT's path in the adapter's own precision
        inner = nn.functional.linear(rows, first.weight)
        out.addmm_(inner, second.weight.to(out.dtype).mT, alpha=scaling)
        return out.view(*x.shape[:-1], -1)

    return run


def _plain_lora(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, float] | None:
    """Base, A, B and scaling of one unmerged adapter without dropout, bias or variant."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None or type(module) is not layers.Linear or not untouched(module):
        return None
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    (name,) = module.active_adapters
    if name not in module.lora_A or name in module.lora_variant:
        return None
    linears = module.base_layer, module.lora_A[name], module.lora_B[name]
    if not all(type(part) is nn.Linear and untouched(part) for part in linears):
        return None
    if linears[1].bias is not None or linears[2].bias is not None:
        return None
    if type(module.lora_dropout[name]) is not nn.Identity:
        return None
    return *linears, float(module.scaling[name])
