"""Products with frozen weights in FP8, and the FP8 copies of these weights.

One FP8 copy of a weight serves forward and backward. The forward sums over the weight's columns, so
the scales of its rows stay outside of the sum. The gradient of the input sums over its rows, so
their scales are multiplied into the gradient before it is quantised; the copy is transposed for
this product. LoRA's own products do not change.

Source: row-wise scales as in torchao's float8 training; which products, HALO, arXiv:2501.02625.
"""

import weakref
from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lemo_hf.kernels.fp8 import quantize_rows, scaled_product, transposed

# An H200 gains half with 1,640 rows (docs/LOG.md); fewer were not measured.
FEWEST_ROWS = 1024


class Fp8Weight:
    """The FP8 copy of a frozen weight ``[out, in]``."""

    def __init__(self, weight: Tensor):
        check_fp8(weight)
        self.made_of, self.stale = state_of(weight), False
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


def state_of(weight: Tensor) -> tuple[int, int]:
    """What PyTorch knows of changes of ``weight``: all but those in place through ``.data``."""
    return weight._version, weight.data_ptr()


class Fp8Linear:
    """Products of one frozen linear of one model.

    Attributes:
        on: Whether they are in FP8.
        copy: The copy of its weight; None until it is needed, when the model is where it trains.
    """

    def __init__(self, on: bool):
        self.on = on
        self.copy: Fp8Weight | None = None
        self._caller: weakref.ref[nn.Module] | None = None
        self._merged: tuple[str, ...] = ()

    def note_caller(self, module: nn.Module) -> None:
        """Note who is called for the product; the copy is stale if that has changed.

        PEFT changes the weight through ``.data`` when it merges adapters. Then the linear stands
        below other adapters, below none, or below some that are merged.
        """
        merged = tuple(vars(module).get("merged_adapters", ()))
        if self._caller is None or self._caller() is not module or merged != self._merged:
            self.spoil()
            self._caller, self._merged = weakref.ref(module), merged

    def spoil(self) -> None:
        """Have the copy made anew, also for other models that share the weight."""
        if self.copy is not None:
            self.copy.stale = True

    def copy_of(self, weight: Tensor) -> Fp8Weight:
        """The copy of its ``weight``, made anew if that has changed or moved."""
        if self.copy is None or not _is_of(self.copy, weight):
            shared = _copies.get(weight)
            self.copy = None if shared is None else shared()
            if self.copy is None or not _is_of(self.copy, weight):
                self.copy = Fp8Weight(weight)
                _copies[weight] = weakref.ref(self.copy)
        return self.copy


def _is_of(copy: Fp8Weight, weight: Tensor) -> bool:
    return not copy.stale and copy.made_of == state_of(weight)


# By modules, since models that share weights may differ in what they multiply in FP8.
linears: MutableMapping[nn.Module, Fp8Linear] = weakref.WeakKeyDictionary()
# A copy serves all models that share its weight, and lives as long as one of them needs it.
_copies: MutableMapping[Tensor, weakref.ref[Fp8Weight]] = WeakTensorKeyDictionary()


def fp8_weight(linear: nn.Linear, rows: int) -> Fp8Weight | None:
    """The FP8 copy of the linear's weight ``[out, in]``, made anew if that has changed or moved.

    Args:
        linear: Linear of a model.
        rows: Number of rows that are multiplied with the weight.

    Returns:
        The copy; None if products with the weight are not in FP8, or for fewer than `FEWEST_ROWS`
        rows.
    """
    found = _in_fp8(linear)
    return None if found is None or rows < FEWEST_ROWS else found.copy_of(linear.weight)


def has_fp8(linear: nn.Module) -> bool:
    """Whether products with the linear's weight are to be in FP8."""
    return _in_fp8(linear) is not None


def called_in_fp8(linear: nn.Module, module: nn.Module) -> bool:
    """Whether the product is to be in FP8 that a call of ``module`` needs: the linear, or an
    adapter above it."""
    found = _in_fp8(linear)
    if found is not None:
        found.note_caller(module)
    return found is not None


def _in_fp8(linear: nn.Module) -> Fp8Linear | None:
    found = linears.get(linear) if linears else None
    return found if found is not None and found.on else None


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
