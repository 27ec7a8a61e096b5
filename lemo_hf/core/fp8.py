"""Products with frozen weights in FP8, and the FP8 copies of these weights.

One FP8 copy of a weight serves forward and backward. The forward sums over the weight's columns, so
the scales of its rows stay outside of the sum. The gradient of the input sums over its rows, so
their scales are multiplied into the gradient before it is quantised; the copy is transposed for
this product. LoRA's own products do not change.

Source: row-wise scales as in torchao's float8 training; which products, HALO, arXiv:2501.02625.
"""

from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lemo_hf.kernels.fp8 import quantize_rows, scaled_product, transposed
from lemo_hf.kernels.launch import sharded

# An H200 gains half with 1,640 rows (docs/LOG.md); fewer were not measured.
FEWEST_ROWS = 1024


class Fp8Weight:
    """The FP8 copy of a frozen weight ``[out, in]``."""

    def __init__(self, weight: Tensor):
        check_fp8(weight)
        self.made_of = (weight._version, weight.data_ptr())
        self.values, self.scales = quantize_rows(weight.detach())
        # In the backward the rows' scales lie in the gradient.
        self._ones = torch.ones(weight.shape[1], 1, device=weight.device)

    def product(self, x: Tensor) -> Tensor:
        """``x @ weight.mT`` for ``x [N, in]``."""
        return scaled_product(quantize_rows(x), (self.values, self.scales), x.dtype)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """``grad @ weight`` for ``grad [N, out]``."""
        quantized = quantize_rows(grad, self.scales.flatten())
        return scaled_product(quantized, (transposed(self.values), self._ones), grad.dtype)


# Of weights that are to have a copy; None until it is needed, when the model is where it trains.
_copies: MutableMapping[Tensor, Fp8Weight | None] = WeakTensorKeyDictionary()


def fp8_weight(weight: Tensor, rows: int) -> Fp8Weight | None:
    """The FP8 copy of ``weight``, made anew if the weight has changed or moved.

    Args:
        weight: Weight of a linear, ``[out, in]``.
        rows: Number of rows that are multiplied with it.

    Returns:
        The copy; None if products with the weight are not in FP8, or for fewer than `FEWEST_ROWS`
        rows.
    """
    if not has_fp8(weight) or rows < FEWEST_ROWS:
        return None
    found = _copies[weight]
    if found is None or found.made_of != (weight._version, weight.data_ptr()):
        found = _copies[weight] = Fp8Weight(weight)
    return found


def has_fp8(weight: Tensor) -> bool:
    """Whether products with ``weight`` are to be in FP8."""
    return bool(_copies) and weight in _copies


def keep_in_fp8(layers: Sequence[nn.Module]) -> list[Tensor]:
    """Compute products with the frozen linears of ``layers`` in FP8 from now on. Returns their
    weights.

    Raises:
        ValueError: ``layers`` have no such linear, or another process holds a part of a weight.
    """
    if any(map(sharded, layers)):
        raise ValueError(
            "fp8=True is not supported with FSDP2 and ZeRO-3, which hold a part of each weight: "
            "use DDP, or leave fp8 unset."
        )
    linears = [
        module
        for layer in layers
        for module in layer.modules()
        if type(module) is nn.Linear and not module.weight.requires_grad
    ]
    # The matrix units read 16 numbers at a time.
    weights = [m.weight for m in linears if m.in_features % 16 == m.out_features % 16 == 0]
    if not weights:
        raise ValueError(
            "fp8=True takes products with frozen weights in FP8, and no decoder layer has a frozen "
            "nn.Linear whose sizes are multiples of 16: train with LoRA on 16-bit weights, or "
            "leave fp8 unset."
        )
    for weight in weights:
        _copies[weight] = None
        check_fp8(weight)
    return weights


def forget(weights: Iterable[Tensor]) -> None:
    """Undo `keep_in_fp8` for ``weights``."""
    for weight in weights:
        _copies.pop(weight, None)


class Fp8Switch:
    """Turns products with the frozen linears of ``layers`` to FP8 and back; at first they are."""

    def __init__(self, layers: Sequence[nn.Module]):
        self._weights = keep_in_fp8(layers)

    def turn(self, on: bool) -> None:
        """Turn them to FP8, or back; the copies are freed then."""
        if not on:
            forget(self._weights)
            return
        for weight in self._weights:
            _copies.setdefault(weight, None)


def check_fp8(weight: Tensor) -> None:
    """Raises ValueError if products with ``weight`` cannot be in FP8."""
    if weight.device.type != "cuda":
        return  # by the definition
    if torch.cuda.get_device_capability(weight.device) < (9, 0):
        raise ValueError(
            f"fp8=True needs a GPU of compute capability 9.0 or newer (Hopper), and "
            f"{torch.cuda.get_device_name(weight.device)} is older: leave fp8 unset."
        )
    if weight.dtype != torch.bfloat16:
        raise ValueError(
            f"fp8=True needs frozen weights in bfloat16, and some are in {weight.dtype}: load the "
            "model with dtype='bfloat16', or leave fp8 unset."
        )
