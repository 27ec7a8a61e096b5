"""The loss of a step as it is reported, of which the host needs to ask nothing.

With ``logging_nan_inf_filter``, its default, Trainer asks after each step whether the loss is NaN
or infinite, and the GPU waits while the host does all that comes after the answer. Here such a loss
is replaced on the GPU, by what Trainer puts in its place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ASKS = (torch.isnan, torch.isinf, Tensor.isnan, Tensor.isinf)


class FiniteLoss(Tensor):
    """A loss that is finite by construction: whoever asks has the answer without the GPU.

    What is computed from it is a plain tensor.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """As without, but for the questions that are answered."""
        if func in _ASKS and isinstance(args[0], FiniteLoss):
            return torch.zeros(args[0].shape, dtype=torch.bool)  # on the CPU
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def finite_loss(loss: Tensor, instead: Tensor) -> FiniteLoss:
    """``loss``, and ``instead`` where that is NaN or infinite; both on one device, shape ``[]``."""
    return torch.where(torch.isfinite(loss), loss, instead.to(loss.dtype)).as_subclass(FiniteLoss)
