"""Rows made ahead by processes of their own, so that making them costs training no time."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.quality.row import Row, RowSet
from benchmarks.quality.rows import row_of
from benchmarks.quality.source import Source
from benchmarks.quality.texts import Texts

AHEAD = 48  # rows

_source: Source | None = None  # of a process


def _open(base: Path, folder: Path) -> None:
    global _source
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _source = Source(Texts.load(folder), AutoTokenizer.from_pretrained(base))


def _make(rows: RowSet, index: int) -> Row:
    assert _source is not None
    return row_of(_source, rows, index)


class Feed:
    """Makes rows of any set.

    Args:
        base: Directory of the base model, for its tokenizer.
        folder: Of the token file.
        processes: That make rows; 0: the caller does.
    """

    def __init__(self, base: Path, folder: Path, processes: int):
        self._pool = None
        self.texts = Texts.load(folder)
        if processes:  # before CUDA starts: they are forked
            self._pool = ProcessPoolExecutor(
                processes, get_context("fork"), initializer=_open, initargs=(base, folder)
            )
            self._pool.submit(int).result()
        else:
            _open(base, folder)

    def rows(self, rows: RowSet) -> Iterator[Row]:
        """All rows of a set, which does not end."""
        if self._pool is None:
            yield from (_make(rows, index) for index in count())
            return
        waiting = deque(self._pool.submit(_make, rows, index) for index in range(AHEAD))
        try:
            for index in count(AHEAD):
                row = waiting.popleft().result()
                waiting.append(self._pool.submit(_make, rows, index))
                yield row
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Batch:
    """Rows on the device.

    Attributes:
        ids: ``[B, T]``.
        labels: ``[B, T]``.
        gold: ``[B, N]`` bool: blocks that answers depend on.
        asking: ``[B, T]`` bool: tokens of questions.
        num_labels: Of all rows.
        lost: Spans that answers depend on and that no row holds any more.
    """

    ids: Tensor
    labels: Tensor
    gold: Tensor
    asking: Tensor
    num_labels: int
    lost: int

    @classmethod
    def of(cls, rows: list[Row], block_size: int, device: torch.device) -> "Batch":
        """Rows of one length."""

        def moved(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).to(device)

        return cls(
            moved([row.ids.astype(np.int64) for row in rows]),
            moved([row.labels for row in rows]),
            moved([row.gold_blocks(block_size) for row in rows]),
            moved([row.asking for row in rows]),
            sum(int(row.labelled.sum()) for row in rows),
            sum(row.lost for row in rows),
        )
