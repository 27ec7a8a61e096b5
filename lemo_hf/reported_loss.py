"""The loss of a step as it is reported, of which the host needs to ask nothing.

With ``logging_nan_inf_filter``, its default, Trainer asks after each step whether the loss is NaN
or infinite, and the GPU waits while the host does all that comes after the answer. Here such a loss
is replaced on the GPU, by what Trainer puts in its place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_ASKS = (torch.isnan, torch.isinf, Tensor.isnan, Tensor.isinf)


class FiniteLoss(Tensor):
    """A loss that is finite by construction: whoever asks has the answer without the GPU, as long
    as nobody writes into it.

    In all else it is a plain tensor, and what is computed from it is one.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """As of a plain tensor, but for the questions that are answered."""
        with torch._C.DisableTorchFunctionSubclass():
            named = kwargs or {}
            asked = args[0] if args else named.get("input")
            if func in _ASKS and isinstance(asked, FiniteLoss) and not asked._version:
                return torch.zeros(asked.shape, dtype=torch.bool)  # on the CPU
            plain, named = tree_map_only(FiniteLoss, _plain, (args, named))
            return func(*plain, **named)


def _plain(loss: FiniteLoss) -> Tensor:
    return loss.as_subclass(Tensor)


def finite_loss(loss: Tensor, instead: Tensor) -> FiniteLoss:
    """``loss``, and ``instead`` where that is NaN or infinite; both on one device, shape ``[]``."""
    return torch.where(torch.isfinite(loss), loss, instead).as_subclass(FiniteLoss)
