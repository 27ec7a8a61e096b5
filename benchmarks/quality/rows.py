"""Rows of all tasks, each made from its set's seed and its index alone."""

from collections.abc import Callable

import numpy as np

from benchmarks.quality.completion_rows import hidden_row, lexical_row
from benchmarks.quality.row import TASKS, Row, RowSet
from benchmarks.quality.source import Source
from benchmarks.quality.summary_rows import summary_row
from benchmarks.quality.text_rows import text_row

_MAKERS: dict[str, Callable[[Source, RowSet, np.random.Generator], Row]] = dict(
    zip(TASKS, (text_row, lexical_row, hidden_row, summary_row), strict=True)
)


def row_of(source: Source, rows: RowSet, index: int) -> Row:
    """Row ``index`` of a set."""
    salt = (TASKS.index(rows.task), rows.tokens, rows.split == "test", rows.seed, index)
    row = _MAKERS[rows.task](source, rows, np.random.default_rng(salt))
    assert len(row.ids) == rows.tokens, (rows, index, len(row.ids))
    return row
