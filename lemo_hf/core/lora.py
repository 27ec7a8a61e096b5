"""A linear of the model, with or without PEFT's LoRA, in as few passes over memory as possible.

For ``W x + scaling * B (A x)`` PEFT takes two passes over the result for the scaling and the sum,
one over its gradient, and one for the sum of the input's two gradients. Here the products do this
themselves. When a layer runs again and nobody reads the result, the products that make it are left
out (`linear_of`, ``values``).

Source: LoRA, arXiv:2106.09685.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lemo_hf.altered import altering
from lemo_hf.core.fp8 import called_in_fp8, fp8_weight
from lemo_hf.kernels import launch
from lemo_hf.kernels.launch import untouched


class _Adapter(NamedTuple):
    first: Tensor  # A, [r, in]
    second: Tensor  # B, [out, r]
    scaling: float


class _Linear(Function):
    """``x [N, in]`` times a frozen weight, with or without an adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear: nn.Linear,
        first: Tensor | None,
        second: Tensor | None,
        scaling: float,
        values: bool,
    ) -> Tensor:
        weight, bias = linear.weight, linear.bias
        ctx.scaling, ctx.linear, ctx.weight = scaling, linear, weight
        inner = a = b = None
        if first is not None and second is not None:
            a, b = first.to(x.dtype), second.to(x.dtype)
            inner = _product(x, a.mT, scaling)
            ctx.dtype = first.dtype
        ctx.save_for_backward(x if first is not None else None, inner, a, b)
        if not values:
            return x.new_empty(()).expand(len(x), len(weight))
        if (eight := fp8_weight(linear, len(x))) is not None:
            out = eight.product(x)
            out = out if bias is None else out.add_(bias)
        else:
            out = x @ weight.mT if bias is None else torch.addmm(bias, x, weight.mT)
        if inner is not None and b is not None:
            out.addmm_(inner, b.mT)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            eight = fp8_weight(ctx.linear, len(grad))
            grad_x = grad @ ctx.weight if eight is None else eight.input_gradient(grad)
        if a is None:
            return grad_x, *[None] * 5
        grad_inner = _product(grad, b, ctx.scaling)
        if grad_x is not None:
            grad_x.addmm_(grad_inner, a)
        grad_a = _product_in(ctx.dtype, grad_inner.mT, x)
        grad_b = _product_in(ctx.dtype, grad.mT, inner)
        return grad_x, None, grad_a, grad_b, None, None


def _product(x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """``scaling * x @ y``."""
    nothing = x.new_empty(1)  # which is not read, since beta is 0
    return torch.addmm(nothing, x, y, beta=0, alpha=scaling)


def _product_in(dtype: torch.dtype, x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` in ``dtype``, which is theirs or fp32."""
    if dtype == x.dtype or x.device.type not in launch.WIDENING:
        return (x @ y).to(dtype)
    return torch.mm(x, y, out_dtype=dtype)


def linear_of(module: nn.Module, values: bool = True) -> Callable[[Tensor], Tensor]:
    """Function to call in place of a linear of the model; ``module`` itself if it must be called.

    Args:
        module: Module of any kind.
        values: Whether the result is read; if False only its gradients are right.
    """
    base, adapter = _parts(module)
    if base is None:
        return _called(module) if values else module
    in_fp8 = called_in_fp8(base, module)
    if values and adapter is None and not in_fp8:
        return module

    def run(x: Tensor) -> Tensor:
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        same = base.weight.dtype == x.dtype and low in (None, x.dtype)
        if not same or (adapter and low is None and adapter.first.dtype != x.dtype):
            return _called(module)(x)  # in another precision
        # Autocast finds nothing to cast: all that is multiplied has its dtype.
        parts = adapter or (None, None, 1.0)
        out = _Linear.apply(x.flatten(0, -2), base, *parts, values)
        return out.view(*x.shape[:-1], -1) if values else out.unflatten(0, x.shape[:-1])

    return run


def _called(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Function that calls the module; PEFT's multiplies by its frozen weight in FP8, if it may."""
    base = getattr(module, "base_layer", None)
    if base is None or not _is_frozen(base) or not called_in_fp8(base, module):
        return module

    def multiply(x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if x.dtype != base.weight.dtype:
            return nn.Linear.forward(base, x)
        parts = None, None, 1.0, True
        return _Linear.apply(x.flatten(0, -2), base, *parts).view(*x.shape[:-1], -1)

    def run(x: Tensor) -> Tensor:
        with altering(base, forward=multiply):
            return module(x)

    return run


def has_adapter(module: nn.Module) -> bool:
    """Whether the module has an adapter that `linear_of` supports."""
    return _parts(module)[1] is not None


def _parts(module: Any) -> tuple[nn.Linear | None, _Adapter | None]:
    """The frozen linear that a call multiplies by, and its one plain adapter; None for any other
    module."""
    if _is_frozen(module):
        return cast(nn.Linear, module), None
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None or type(module) is not layers.Linear or not untouched(module):
        return None, None
    if module.merged:
        return None, None
    if module.disable_adapters:
        return (module.base_layer if _is_frozen(module.base_layer) else None), None
    if len(module.active_adapters) != 1:
        return None, None
    (name,) = module.active_adapters
    if name not in module.lora_A or name in module.lora_variant:
        return None, None
    first, second = module.lora_A[name], module.lora_B[name]
    plain = all(type(part) is nn.Linear and untouched(part) for part in (first, second))
    if not plain or first.bias is not None or second.bias is not None:
        return None, None
    if type(module.lora_dropout[name]) is not nn.Identity or not _is_frozen(module.base_layer):
        return None, None
    return module.base_layer, _Adapter(first.weight, second.weight, float(module.scaling[name]))


def _is_frozen(module: nn.Module) -> bool:
    """Whether a call multiplies by a weight that is not trained, and does nothing else."""
    if type(module) is not nn.Linear or not untouched(module):
        return False
    weight, bias = module.weight, module.bias
    return (
        type(weight) in launch.PLAIN
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )
