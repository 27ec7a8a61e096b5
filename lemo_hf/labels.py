"""The labels of a pass, of which a loss that is not LeMo's gets those of kept tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.loss import shifted, supervised_targets
from lemo_hf.step import Step


@dataclass
class Labels:
    """What a pass is to predict.

    Attributes:
        name: The argument they came by; ``"shift_labels"`` stand where they are predicted.
        tensor: ``[B, T]`` int64, a copy that may be changed.
        num_items: fp32 scalar tensor that may be changed, or None.
    """

    name: str
    tensor: Tensor
    num_items: Tensor | None

    @classmethod
    def copy_of(
        cls, tensor: Tensor, num_items: Tensor | int | None, name: str = "labels"
    ) -> "Labels":
        """Labels that the pass may change; the caller's stay as they are."""
        if num_items is not None:
            num_items = torch.as_tensor(num_items, device=tensor.device).float().clone()
        return cls(name, tensor.clone(), num_items)

    @classmethod
    def in_call(cls, kwargs: dict[str, Any]) -> "Labels | None":
        """The labels among the arguments of the model, if there are any."""
        for name in ("shift_labels", "labels"):
            if kwargs.get(name) is not None:
                return cls.copy_of(kwargs[name], kwargs.get("num_items_in_batch"), name)
        return None

    def targets(self) -> Tensor:
        """``[B, T]``: the token each position must predict."""
        return self.tensor if self.name == "shift_labels" else shifted(self.tensor)

    def strike(self, step: Step) -> None:
        """Ignore what eliminated tokens would have to predict; take it out of the item count."""
        before = self.targets()
        after, _ = supervised_targets(before, step)
        if self.num_items is not None:
            count = (before != IGNORE_INDEX).sum().clamp_min(1)
            left = (after != IGNORE_INDEX).sum()
            # Of none that are left the sum is 0; divided by 0 it would be NaN.
            self.num_items.mul_(torch.where(left > 0, left / count, 1))
        if self.name == "shift_labels":
            self.tensor.copy_(after)
        else:
            self.tensor[:, 1:] = after[:, :-1]
