"""The lines on a run and on its first batch, from a config and counts alone."""

import pytest

from lemo_hf import LeMoConfig
from lemo_hf.batch.row_counts import RowCounts
from lemo_hf.describe import describe_batch, describe_run

RULES = LeMoConfig().layer_rules(2)


def run_line(**fields):
    return describe_run(LeMoConfig(**fields), RULES, "sdpa", None)


def test_chance_is_said():
    """A quarter by chance is a default, so the first line says it."""
    assert "25% of them by chance" in run_line()
    assert "% of them by chance" not in run_line(random_share=0)


@pytest.mark.parametrize(
    ("fields", "said"), [({"policy": "overlap"}, True), ({"dense_finish": 0}, True), ({}, False)]
)
def test_a_finish_retention_without_a_finish_is_said(fields, said):
    unread = "finish_retention=0.5 has no effect: set dense_finish"
    assert (unread in run_line(finish_retention=0.5, **fields)) is said


def test_layers_that_keep_different_shares_are_told_as_a_range():
    apart = LeMoConfig(retention=(0.3, 1), agree_across_layers=False)
    row = RowCounts(640, 10, 10, 640, 0, 0)
    assert "about 192 to 640 tokens (30% to 100%) train" in describe_batch(
        apart, [row], {"attention": [(192, 640)]}
    )


def test_rows_without_labels_are_said():
    """No label is no label."""
    row = RowCounts(640, 10, 2, 128, 0, 0)
    assert "640-token row (no labels) about 192" in describe_batch(
        LeMoConfig(random_share=0), [row], {"attention": [(192, 192)]}
    )
