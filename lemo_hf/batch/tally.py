"""Counts of what passes of a model have kept: of one pass, and of all since the counts began."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lemo_hf.batch.row_counts import RowCounts


@dataclass(frozen=True)
class Seen:
    """What one pass, which has ended, kept.

    Attributes:
        real_tokens: Number of the batch's tokens without padding.
        real_blocks: ``[B, N]`` bool: blocks with such tokens.
        kept_tokens: Kept tokens, summed over layers, by "attention" and "mlp", int64 scalars.
        kept_blocks: Kept blocks, ``[B, N]`` bool, by ``(layer, "attention" or "mlp")``.
    """

    real_tokens: int
    real_blocks: Tensor
    kept_tokens: dict[str, Tensor | int]
    kept_blocks: dict[tuple[int, str], Tensor]

    def clone(self) -> "Seen":
        """A copy in memory of its own, in which layers share the same sets."""
        sets = {id(blocks): blocks.clone() for blocks in self.kept_blocks.values()}
        return Seen(
            self.real_tokens,
            self.real_blocks.clone(),
            {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.kept_tokens.items()},
            {key: sets[id(blocks)] for key, blocks in self.kept_blocks.items()},
        )


First = tuple[list[RowCounts], dict[str, list[tuple[int, int]]], list[int]]


class Tally:
    """What passes have kept since `reset`.

    Attributes:
        counts: Number of tokens without padding ("real"), and of kept tokens, summed over layers,
            of "attention" and "mlp".
        kept_blocks: Kept blocks of the last pass, ``[B, N]`` bool, by
            ``(layer, "attention" or "mlp")``.
        first: Counts of the rows of the first pass outside the finish, the fewest and the most
            tokens that its attentions and MLPs kept of each, and how many documents each holds;
            None before that pass, and once this was reported.
        listeners: Functions that get what a pass has kept, once it is counted.
    """

    def __init__(self) -> None:
        self.kept_blocks: dict[tuple[int, str], Tensor] = {}
        self.first: First | None = None
        self.listeners: list[Callable[[Seen], None]] = []
        self._begun = False
        self.reset()

    def reset(self) -> None:
        """Start the counts anew."""
        self.counts: dict[str, Any] = {"real": 0, "attention": 0, "mlp": 0}

    def add(self, seen: Seen) -> None:
        """Count a pass that has ended."""
        self.kept_blocks = seen.kept_blocks
        self.counts["real"] += seen.real_tokens
        for name, count in seen.kept_tokens.items():
            self.counts[name] = self.counts[name] + count
        for listener in self.listeners:
            listener(seen)

    def note_first(
        self,
        rows: list[RowCounts],
        slots: dict[str, list[tuple[int, int]]],
        documents: Tensor | None,
    ) -> None:
        """Remember the ``rows`` of a pass, the ``slots`` that it kept of each, and how many there
        are of the ``documents`` (``[B, T]`` ascending ids from 0, or None), if it is the first
        pass."""
        if self._begun:
            return
        counts = [1] * len(rows) if documents is None else (documents[:, -1] + 1).tolist()
        self.first, self._begun = (rows, slots, counts), True
