"""The time of training, by which a run's speed is told: evaluations and saving are left out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

# A mixin has no base of its own; type checkers are told whose methods it stands before.
if TYPE_CHECKING:
    _Mixed = Trainer
else:
    _Mixed = object


class Stopwatch:
    """Seconds since the last lap, without what was left out."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._started = time.perf_counter()
        self._marked: float | None = self._started

    def go_on(self) -> None:
        """Training goes on: nothing is left out before the next mark or lap."""
        self._marked = None

    def mark(self, wait: bool = True) -> None:
        """Note the time: what comes now may be left out.

        Args:
            wait: Whether to wait for the GPU first, whose queue may still hold steps of training.
        """
        if wait and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._marked = time.perf_counter()

    @property
    def marked(self) -> bool:
        """Whether training has not gone on since the last mark or lap."""
        return self._marked is not None

    def leave_out(self) -> None:
        """Leave out the time since the last mark or lap, if training has not gone on; and mark."""
        now = time.perf_counter()
        if self._marked is not None:
            self._started += now - self._marked
        self._marked = now

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        since = self._started
        self._started = self._marked = time.perf_counter()
        return self._started - since


class TimedMixin(_Mixed):
    """Mixin of a trainer that keeps the time of its training."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._stopwatch = Stopwatch()
        super().__init__(*args, **kwargs)

    @contextmanager
    def _left_out(self) -> Iterator[None]:
        self._stopwatch.mark()
        try:
            yield
        finally:
            self._stopwatch.leave_out()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; its time is none of training."""
        with self._left_out():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As Trainer's; its time is none of training."""
        with self._left_out():
            return super().predict(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._left_out():
            super()._save_checkpoint(*args, **kwargs)
