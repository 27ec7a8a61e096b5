"""Turns the products of a model's frozen linears to FP8 and back, and notices changed weights."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lemo_hf.core.fp8 import Fp8Linear, check_fp8, linears, state_of
from lemo_hf.kernels.launch import sharded

logger = logging.getLogger(__name__)

CHANGED = (
    "fp8=True: frozen weights were changed past PyTorch's count of changes (through .data), and "
    "their FP8 copies are made anew. The training pass before this one still multiplied by the old "
    "ones: call LeMo.set_fp8(False) and LeMo.set_fp8(True) after such a change. This is said once."
)


class Fp8Switch:
    """Turns products with the frozen linears of ``layers`` to FP8 and back; at first they are.

    A deep copy does the same for copies of the linears.

    Args:
        layers: Decoder layers.

    Attributes:
        changes: How often `look` has found that weights had changed.

    Raises:
        ValueError: ``layers`` have no such linear, or another process holds a part of a weight.
    """

    changes = 0
    _said = False

    def __init__(self, layers: Sequence[nn.Module]):
        self.__setstate__((_frozen_linears(layers), True))

    def __getstate__(self) -> tuple[list[nn.Linear], bool]:
        return self._linears, self._on

    def __setstate__(self, state: tuple[list[nn.Linear], bool]) -> None:
        self._linears, self._on = state
        self._seen: list = []
        self._sample: _Sample | None = None
        for linear in self._linears:
            linears[linear] = Fp8Linear(self._on)

    def turn(self, on: bool) -> None:
        """Turn them to FP8, or back; the copies are freed then."""
        if on != self._on:
            self.__setstate__((self._linears, on))

    def remove(self) -> None:
        """Leave nothing in FP8 and no copy."""
        self.turn(False)
        for linear in self._linears:
            linears.pop(linear, None)

    def look(self) -> None:
        """Look for changes of the weights since the last look; copies of changed ones are stale.

        Called before each training pass. What PyTorch counts, and weights that moved, are seen at
        once. A change in place through ``.data`` is seen by a number of each row, read on the
        weights' device; the host does not wait for it, so with CUDA the next look finds it.
        """
        if not self._on or _is_capturing():  # by the user
            return
        # One that somebody has parametrized since makes its weight from others.
        held = [vars(linear)["_parameters"].get("weight") for linear in self._linears]
        weights = [weight for weight in held if weight is not None and not weight.requires_grad]
        seen = [state_of(weight) for weight in weights]
        if self._sample is not None and seen == self._seen:
            if not self._sample.differs():
                return
            for linear in self._linears:
                linears[linear].spoil()
            if self._sample.late and not self._said:
                self._said = True
                logger.warning(CHANGED)
        self.changes += 1
        self._seen, self._sample = seen, _Sample(weights)


class _Sample:
    """A number of each row of ``weights``, by which one sees whether they are what they were.

    Attributes:
        late: Whether a difference is found at the next look.
    """

    def __init__(self, weights: Sequence[Tensor]):
        # Fake weights, of a plan, hold no numbers.
        plain = [w.detach() for w in weights if type(w) is nn.Parameter]
        groups: dict[tuple, list[Tensor]] = {}
        for weight in plain:
            # The next column in each row: of a row or a column that is changed one is seen too.
            flat = weight.view(-1) if weight.is_contiguous() else None
            view = weight.diagonal() if flat is None else flat[:: weight.shape[1] + 1]
            groups.setdefault((weight.device, weight.dtype), []).append(view)
        self._groups = list(groups.values())
        self._kept = [torch.cat(views) for views in self._groups]
        on_gpus = [kept for kept in self._kept if kept.is_cuda]
        self.late = bool(on_gpus)
        self._answers = torch.zeros(len(self._kept), dtype=torch.bool, pin_memory=self.late)
        self._asked = [torch.cuda.Event() for _ in on_gpus]

    def differs(self) -> bool:
        """Whether a difference is known. Asks anew, once the last question is answered."""
        if not all(event.query() for event in self._asked):
            return False
        found = bool(self._answers.any())
        events = iter(self._asked)
        for place, views, kept in zip(self._answers, self._groups, self._kept, strict=True):
            place.copy_((torch.cat(views) != kept).any(), non_blocking=True)
            if kept.is_cuda:
                next(events).record(torch.cuda.current_stream(kept.device))
        return found if self.late else bool(self._answers.any())


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _frozen_linears(layers: Sequence[nn.Module]) -> list[nn.Linear]:
    if any(map(sharded, layers)):
        raise ValueError(
            "fp8=True is not supported with FSDP2 and ZeRO-3, which hold a part of each weight: "
            "use DDP, or leave fp8 unset."
        )
    frozen = [
        module
        for layer in layers
        for module in layer.modules()
        if type(module) is nn.Linear and not module.weight.requires_grad
    ]
    # The matrix units read 16 numbers at a time.
    found = [m for m in frozen if m.in_features % 16 == m.out_features % 16 == 0]
    if not found:
        raise ValueError(
            "fp8=True takes products with frozen weights in FP8, and no decoder layer has a frozen "
            "nn.Linear whose sizes are multiples of 16: train with LoRA on 16-bit weights, or "
            "leave fp8 unset."
        )
    for module in found:
        check_fp8(module.weight)
    return found
