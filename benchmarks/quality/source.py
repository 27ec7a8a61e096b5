"""What rows are made of: stretches of books, places to insert something, and a tokenizer."""

from collections.abc import Iterable

import numpy as np

from benchmarks.quality.facts import Question
from benchmarks.quality.row import RowSet
from benchmarks.quality.texts import Texts


class Source:
    """Texts and the tokenizer of the base model.

    Args:
        texts: Books and reports.
        tokenizer: Byte-level BPE.
    """

    def __init__(self, texts: Texts, tokenizer):
        self.texts, self.tokenizer = texts, tokenizer
        vocabulary = tokenizer.get_vocab()
        self._breaks = np.array([i for token, i in vocabulary.items() if "Ċ" in token], np.uint16)

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def told(self, questions: Iterable[Question]) -> list[list[int]]:
        """Every fact of ``questions`` as a line of its own."""
        return [self.encode(f"\n{fact}\n") for question in questions for fact in question.facts]

    def book(self, rows: RowSet, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Consecutive tokens of a book; of several where books are short."""
        books, weights = self.texts.books[rows.split], self.texts.book_weights[rows.split]
        parts, missing = [], tokens
        while missing > 0:
            book = books[rng.choice(len(books), p=weights)]
            start = int(rng.integers(max(1, len(book) - missing + 1)))
            parts.append(book[start : start + missing])
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def places(
        self, rng: np.random.Generator, text: np.ndarray, count: int, taken: np.ndarray
    ) -> list[int]:
        """Distinct places in ``text``, ascending, at line breaks, outside of ``taken [n, 2]``."""
        free = np.ones(len(text), dtype=bool)
        free[:1] = False
        for start, stop in taken:
            free[start + 1 : stop] = False
        lines = np.zeros(len(text), dtype=bool)
        lines[1:] = np.isin(text[:-1], self._breaks)
        found = np.flatnonzero(free & lines)
        if len(found) < 2 * count:
            found = np.flatnonzero(free)
        return sorted(rng.choice(found, count, replace=False).tolist())


def passages(rng: np.random.Generator, tokens: int, count: int, size: int) -> np.ndarray:
    """``[count, 2]`` spans of ``size`` of ``tokens`` tokens, one in each of ``count`` parts."""
    part = tokens // max(1, count)
    starts = [i * part + int(rng.integers(part - size)) for i in range(count)]
    return np.array([(s, s + size) for s in starts], dtype=np.int64).reshape(-1, 2)
