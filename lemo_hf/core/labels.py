"""The labels of a pass. A loss that is not LeMo's gets those of kept tokens."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lemo_hf.core.loss import share_left, shifted, supervised_targets
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX


@dataclass
class Labels:
    """The labels of one pass.

    Attributes:
        name: Argument that they were given as; ``"shift_labels"`` stand at the position that
            predicts them.
        tensor: ``[B, T]`` int64, a copy that may be changed.
        num_items: fp32 scalar tensor that may be changed, or None.
        ignored: Value that means no label: the loss's ``ignore_index``.
        prompt: Number of virtual tokens (prompt tuning) before them, which have no labels.
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
        """A copy that the pass may change; the caller's labels do not change."""
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
        """Whether the labels have the shape of ``batch``, ``[B, T]`` ids or embeddings
        ``[B, T, H]``, perhaps behind a prompt."""
        more = batch.shape[1] - self.tensor.shape[1]
        self.prompt = more if more > 0 and batch.dim() == 3 else 0
        return self.tensor.shape[0] == batch.shape[0] and more == self.prompt

    def targets(self) -> Tensor:
        """The token that each position must predict, ``[B, prompt + T]``, `IGNORE_INDEX` for
        none."""
        targets = self.tensor
        if self.ignored != IGNORE_INDEX:
            targets = targets.masked_fill(targets == self.ignored, IGNORE_INDEX)
        if self.name == "shift_labels":
            return targets
        return shifted(nn.functional.pad(targets, (self.prompt, 0), value=IGNORE_INDEX))

    def strike(self, sparse_pass: SparsePass) -> None:
        """Strike the labels of tokens that were left out, and subtract them from the item count."""
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
    """Labels of a training step; each of its passes may strike some.

    Attributes:
        whole: Labels as they were before any pass.
    """

    whole: Labels = field(kw_only=True)

    def __post_init__(self) -> None:
        self._left = self.whole.tensor, self.tensor._version  # what is in `tensor` now

    def strike(self, sparse_pass: SparsePass) -> None:
        """As `Labels.strike`."""
        self._take_edits()
        super().strike(sparse_pass)
        self._left = self.tensor.clone(), self.tensor._version

    def _take_edits(self) -> None:
        """Take over what the user has written into the tensor since it was made or struck."""
        left, version = self._left
        if self.tensor._version != version:
            whole, tensor = self.whole.tensor, self.tensor
            whole.copy_(torch.where(tensor != left, tensor, whole))
            self._left = tensor.clone(), tensor._version

    def fit(self, batch: Tensor) -> bool:
        """As `Labels.fit`."""
        return super().fit(batch) and self.whole.fit(batch)

    def restored(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a pass, with these labels as they were before, if they are among the
        arguments."""
        self._take_edits()
        changed = ((self.tensor, self.whole.tensor), (self.num_items, self.whole.num_items))
        return {
            name: next((whole for struck, whole in changed if value is struck), value)
            for name, value in kwargs.items()
        }


class AnnouncedLabels:
    """Labels of losses outside the model, which a trainer announces before it calls the model.

    Attributes:
        for_next: Labels of the next pass, which does not get them as an argument; or None.
        for_step: Labels of any pass of the step, which may get them as an argument; or None.
    """

    def __init__(self) -> None:
        self.for_next: Labels | None = None
        self.for_step: StepLabels | None = None

    def promise(self, tensor: Tensor, num_items: Tensor | int | None) -> Labels:
        """Announce labels of the next pass, which does not get them as an argument."""
        self.for_next = Labels.copy_of(tensor, num_items)
        return self.for_next

    def expect(self, tensor: Tensor, num_items: Any) -> Labels:
        """Announce labels for any pass of the step, which may get them as an argument.

        ``num_items`` is a tensor that may be changed, or None.
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
            promised: Labels that were announced as `for_next`, or None.
            batch: Input of the model.

        Returns:
            The labels of a loss outside the model, and the same before any pass struck some; or
            None twice.
        """
        if promised is not None:
            promised.fit(batch)
            return promised, promised
        if self.for_step is not None and self.for_step.fit(batch):
            return self.for_step, self.for_step.whole
        return None, None
