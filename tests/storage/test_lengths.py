"""The longest row of a dataset, where reading it changes nothing."""

import pytest
from datasets import Dataset, IterableDataset

from lemo_hf.storage.lengths import longest_row

ROWS = [{"input_ids": [0] * length} for length in (3, 9, 5, 30)]


@pytest.mark.parametrize("make", [list, Dataset.from_list])
def test_lists_and_plain_datasets_are_read(make):
    assert longest_row(make(ROWS), 100) == 30
    assert longest_row(make([{"text": "no ids"}]), 100) == 0


def test_reading_stops_where_a_row_is_long_enough():
    def rows():
        yield from ROWS[:2]
        raise AssertionError("one more was read")

    class Rows(list):
        def __iter__(self):
            return rows()

    assert longest_row(Rows(ROWS), 9) == 9


@pytest.mark.parametrize(
    "rows",
    [
        IterableDataset.from_generator(lambda: iter(ROWS)),
        Dataset.from_list(ROWS).with_transform(lambda batch: batch),
        [("a", "tuple")],
        None,
    ],
)
def test_others_are_not(rows):
    assert longest_row(rows, 100) is None
