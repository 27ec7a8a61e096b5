"""The labels of a pass, of which a loss that is not LeMo's gets those of kept tokens."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lemo_hf.core.loss import share_left, shifted, supervised_targets
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX


@dataclass
class Labels:
    """What a pass is to predict.

    Attributes:
        name: The argument they came by; ``"shift_labels"`` stand where they are predicted.
        tensor: ``[B, T]`` int64, a copy that may be changed.
        num_items: fp32 scalar tensor that may be changed, or None.
        ignored: What a loss that is given ``ignore_index`` takes for no label.
        prompt: Virtual tokens (prompt tuning) that the model has before them, and no label for.
    """

    name: str
    tensor: Tensor
    num_items: Tensor | None
    ignored: int = IGNORE_INDEX
    prompt: int = 0

    @classmethod
    def copy_of(
        cls,
        tensor: Tensor,
        num_items: Tensor | int | None,
        name: str = "labels",
        ignored: int = IGNORE_INDEX,
    ) -> "Labels":
        """Labels that the pass may change; the caller's stay as they are."""
        if num_items is not None:
            num_items = torch.as_tensor(num_items, device=tensor.device).float().clone()
        return cls(name, tensor.clone(), num_items, ignored)

    @classmethod
    def in_call(cls, kwargs: dict[str, Any]) -> "Labels | None":
        """The labels among the arguments of the model, if there are any."""
        for name in ("shift_labels", "labels"):
            if kwargs.get(name) is not None:
                ignored = kwargs.get("ignore_index", IGNORE_INDEX)
                return cls.copy_of(kwargs[name], kwargs.get("num_items_in_batch"), name, ignored)
        return None

    def fit(self, batch: Tensor) -> bool:
        """Whether they are of the tokens of ``batch``, ``[B, T]`` ids or embeddings ``[B, T, H]``,
        before which there may be a prompt."""
        more = batch.shape[1] - self.tensor.shape[1]
        self.prompt = more if more > 0 and batch.dim() == 3 else 0
        return self.tensor.shape[0] == batch.shape[0] and more == self.prompt

    def targets(self) -> Tensor:
        """``[B, prompt + T]``: the token each position must predict, `IGNORE_INDEX` for none."""
        targets = self.tensor
        if self.ignored != IGNORE_INDEX:
            targets = targets.masked_fill(targets == self.ignored, IGNORE_INDEX)
        if self.name == "shift_labels":
            return targets
        return shifted(nn.functional.pad(targets, (self.prompt, 0), value=IGNORE_INDEX))

    def strike(self, sparse_pass: SparsePass) -> None:
        """Ignore what eliminated tokens would have to predict; take it out of the item count."""
        before = self.targets()
        after, _ = supervised_targets(before, sparse_pass)
        if self.num_items is not None:
            self.num_items.mul_(share_left(before, after))
        struck = (before != IGNORE_INDEX) & (after == IGNORE_INDEX)
        if self.name == "shift_labels":
            self.tensor.masked_fill_(struck, self.ignored)
        elif self.prompt:
            self.tensor.masked_fill_(struck[:, self.prompt - 1 : -1], self.ignored)
        else:
            self.tensor[:, 1:].masked_fill_(struck[:, :-1], self.ignored)


@dataclass
class StepLabels(Labels):
    """Labels of a training step, of which each of its passes may strike some.

    Attributes:
        whole: As they were.
    """

    whole: Labels = field(kw_only=True)

    def fit(self, batch: Tensor) -> bool:
        """As of `Labels`."""
        return super().fit(batch) and self.whole.fit(batch)

    def restored(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a pass, with these as they were where they are among them."""
        changed = ((self.tensor, self.whole.tensor), (self.num_items, self.whole.num_items))
        return {
            name: next((whole for struck, whole in changed if value is struck), value)
            for name, value in kwargs.items()
        }


class AnnouncedLabels:
    """Labels of losses outside the model, which a trainer shows before it calls the model.

    Attributes:
        for_next: Of the next pass, which is not given them; or None.
        for_step: Of any pass of the step, given them or not; or None.
    """

    def __init__(self) -> None:
        self.for_next: Labels | None = None
        self.for_step: StepLabels | None = None

    def promise(self, tensor: Tensor, num_items: Tensor | int | None) -> Labels:
        """Announce labels that the next pass is not given."""
        self.for_next = Labels.copy_of(tensor, num_items)
        return self.for_next

    def expect(self, tensor: Tensor, num_items: Any) -> Labels:
        """Announce labels that any pass of the step may take, given them or not.

        ``num_items``, a tensor or None, may be changed.
        """
        whole = Labels.copy_of(tensor, num_items)
        self.for_step = StepLabels("labels", tensor.clone(), num_items, whole=whole)
        return self.for_step

    def any(self) -> bool:
        """Whether the loss of the next pass may be made outside the model."""
        return self.for_next is not None or self.for_step is not None

    def restored(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a pass, with labels of the step as they were."""
        return kwargs if self.for_step is None else self.for_step.restored(kwargs)

    def of_pass(self, promised: Labels | None, batch: Tensor) -> tuple[Labels | None, ...]:
        """Labels of a pass over ``batch``, ``[B, T]`` ids or embeddings ``[B, T, H]``.

        Args:
            promised: Those that were `for_next`, or None.
            batch: The model's input.

        Returns:
            Those that a loss outside takes, and the same as no pass has struck any; or None twice.
        """
        if promised is not None:
            promised.fit(batch)
            return promised, promised
        if self.for_step is not None and self.for_step.fit(batch):
            return self.for_step, self.for_step.whole
        return None, None
