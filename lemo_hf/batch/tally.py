"""What passes of a model have kept: of one that ended, and of all since the counts began."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lemo_hf.batch.row_counts import RowCounts


@dataclass(frozen=True)
class Seen:
    """What a pass that ended has kept.

    Attributes:
        real_tokens: Of the batch that are no padding.
        real_blocks: ``[B, N]`` bool: blocks with such tokens.
        kept_tokens: Token-layers of "attention" and "mlp", int64 scalars.
        kept_blocks: ``[B, N]`` bool by ``(layer, "attention" or "mlp")``.
    """

    real_tokens: int
    real_blocks: Tensor
    kept_tokens: dict[str, Tensor | int]
    kept_blocks: dict[tuple[int, str], Tensor]

    def clone(self) -> "Seen":
        """The same in other memory; sets that layers share are one there too."""
        sets = {id(blocks): blocks.clone() for blocks in self.kept_blocks.values()}
        return Seen(
            self.real_tokens,
            self.real_blocks.clone(),
            {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.kept_tokens.items()},
            {key: sets[id(blocks)] for key, blocks in self.kept_blocks.items()},
        )


class Tally:
    """What passes have kept since `reset`.

    Attributes:
        counts: Tokens that were no padding ("real"), and kept token-layers of "attention" and
            "mlp".
        kept_blocks: Of the last pass: ``[B, N]`` bool by ``(layer, "attention" or "mlp")``.
        first: Counts of the rows of the first pass that is none of the finish, and what it kept of
            each; None before it, and once it was said.
        listeners: Are given what a pass has kept, when it has been counted.
    """

    def __init__(self) -> None:
        self.kept_blocks: dict[tuple[int, str], Tensor] = {}
        self.first: tuple[list[RowCounts], list[int]] | None = None
        self.listeners: list[Callable[[Seen], None]] = []
        self._begun = False
        self.reset()

    def reset(self) -> None:
        """Start the counts anew."""
        self.counts: dict[str, Any] = {"real": 0, "attention": 0, "mlp": 0}

    def add(self, seen: Seen) -> None:
        """Count a pass that ended."""
        self.kept_blocks = seen.kept_blocks
        self.counts["real"] += seen.real_tokens
        for name, count in seen.kept_tokens.items():
            self.counts[name] = self.counts[name] + count
        for listener in self.listeners:
            listener(seen)

    def note_first(self, rows: list[RowCounts], slots: list[int]) -> None:
        """Remember ``rows`` of a pass, and the ``slots`` it kept of each, if it is the first."""
        if not self._begun:
            self.first, self._begun = (rows, slots), True
