"""A row to train on or to be asked: it knows where its answers stand and what they depend on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX

TASKS = ("text", "lexical", "hidden", "summary")
Span = tuple[int, int]  # the first token, and the one behind the last


@dataclass(frozen=True)
class RowSet:
    """A set of rows: everything but the index.

    Attributes:
        task: One of `TASKS`.
        tokens: Of a row.
        split: "train" or "test".
        seed: Of the set.
    """

    task: str
    tokens: int
    split: str = "train"
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        ids: ``[T]`` uint16.
        labelled: ``[T]`` bool: tokens that are labels.
        asked_from: Place of the first token of what asks; T where all is labelled.
        answers: ``[A, 2]`` spans.
        kinds: Of each answer.
        gold: ``[G, 2]`` spans that some answer depends on.
        lost: How many of them were cut off.
    """

    ids: np.ndarray
    labelled: np.ndarray
    asked_from: int
    answers: np.ndarray
    kinds: tuple[str, ...]
    gold: np.ndarray
    lost: int = 0

    @property
    def labels(self) -> np.ndarray:
        """``[T]`` int64, as a causal LM takes them."""
        return np.where(self.labelled, self.ids.astype(np.int64), IGNORE_INDEX)

    @property
    def asking(self) -> np.ndarray:
        """``[T]`` bool: tokens of questions, without their answers."""
        return (np.arange(len(self.ids)) >= self.asked_from) & ~self.labelled

    def gold_blocks(self, size: int) -> np.ndarray:
        """``[ceil(T / size)]`` bool: blocks of ``size`` tokens that some answer depends on."""
        blocks = np.zeros(-(-len(self.ids) // size), dtype=bool)
        for start, stop in self.gold:
            blocks[start // size : (stop - 1) // size + 1] = True
        return blocks

    def part(self, start: int, stop: int) -> "Row":
        """Tokens of a range as a row, with the answers and the gold that lie in it."""
        inside = [start <= a and b <= stop for a, b in self.answers]
        held = [start <= a and b <= stop for a, b in self.gold]
        return Row(
            self.ids[start:stop],
            self.labelled[start:stop],
            max(0, self.asked_from - start),
            self.answers[inside] - start,
            tuple(kind for kind, keep in zip(self.kinds, inside, strict=True) if keep),
            self.gold[held] - start,
        )

    def cut(self, parts: int) -> list["Row"]:
        """What a run with rows of 1 / ``parts`` of the length makes of this one.

        A row that asks at its end keeps its end. A row that is labelled throughout is split.
        """
        size = len(self.ids) // parts
        if parts == 1:
            return [self]
        if not self.labelled.all():
            end = self.part(len(self.ids) - size, len(self.ids))
            return [replace(end, lost=len(self.gold) - len(end.gold))]
        return [self.part(i * size, (i + 1) * size) for i in range(parts)]


def make_row(
    ids: np.ndarray | Sequence[int],
    answers: list[Span],
    kinds: list[str],
    gold: list[Span],
    asked_from: int | None = None,
) -> Row:
    """A row whose labels are its answers; without ``asked_from`` all its tokens are."""
    labelled = np.full(len(ids), asked_from is None)
    for start, stop in answers:
        labelled[start:stop] = True
    spans = [np.array(x, dtype=np.int64).reshape(-1, 2) for x in (answers, sorted(gold))]
    begin = len(ids) if asked_from is None else asked_from
    return Row(np.asarray(ids, np.uint16), labelled, begin, spans[0], tuple(kinds), spans[1])


def weave(
    text: np.ndarray, places: Sequence[int], pieces: Sequence[Sequence[int]]
) -> tuple[np.ndarray, list[Span], Callable[[int], int]]:
    """Insert pieces into a text.

    Args:
        text: ``[n]`` uint16.
        places: Of each piece, ascending: the token that will follow it.
        pieces: Ids.

    Returns:
        The ids, the span of each piece in them, and where a token of ``text`` now is.
    """
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    before = np.concatenate([[0], sizes.cumsum()]).tolist()
    spans = [(p + b, p + b + len(x)) for p, b, x in zip(places, before, pieces, strict=False)]
    values = np.array([i for piece in pieces for i in piece], np.uint16)
    ids = np.insert(text, np.repeat(places, sizes), values)
    return ids, spans, lambda token: token + before[np.searchsorted(places, token, "right")]
