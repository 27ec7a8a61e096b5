"""The lines on a run and on its first batch, from a config and counts alone."""

import pytest

from lemo_hf import LeMoConfig
from lemo_hf.batch.row_counts import RowCounts
from lemo_hf.describe import describe_batch, describe_run

RULES = LeMoConfig().layer_rules(2)


def run_line(asks=None, **fields):
    return describe_run(LeMoConfig(**fields), RULES, "sdpa", None, asks)


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
        apart, [row], {"attention": [(192, 640)]}, [1]
    )


def test_rows_without_labels_are_said():
    """No label is no label."""
    row = RowCounts(640, 10, 2, 128, 0, 0)
    assert "640-token row (no labels) about 192" in describe_batch(
        LeMoConfig(random_share=0), [row], {"attention": [(192, 192)]}, [1]
    )


@pytest.mark.parametrize(
    ("fields", "asks", "said", "unsaid"),
    [
        ({}, None, "part of a row. The last 10% of the steps are dense for rows that are", "@"),
        ({}, True, "label. Loss", "where"),
        ({}, True, "Kept: the blocks with labels and those that share rare", "throughout"),
        ({}, False, "Kept: runs of 512 tokens by chance, others at each step; always", "where"),
        ({}, False, "block of each document. The last 10% of the steps are dense. Loss", "rare"),
        (
            {"dense_finish": 0.2},
            True,
            "with a label. The last 20% of the steps are dense. L",
            "10%",
        ),
        ({"finish_retention": 0.5}, True, "finish_retention=0.5 has no effect: set dense", "10%"),
        ({"policy": "predictor"}, None, "most, and where labels cover a part of a row, for", "@"),
        ({"policy": "predictor"}, True, "most, and for half of them those that share", "where"),
        ({"policy": "predictor"}, False, "attend to most; always", "half"),
    ],
)
def test_a_run_is_told_of_the_rows_it_has(fields, asks, said, unsaid):
    line = run_line(asks, **fields)
    assert said in line and unsaid not in line


def test_packed_documents_are_not_called_a_row():
    row = RowCounts(4096, 64, 4, 256, 0, 4090)
    said = describe_batch(LeMoConfig(), [row], {"attention": [(1280, 1280)]}, [3])
    assert said.startswith(
        "LeMo: of 3 documents packed in a row of 4,096 tokens (labels throughout) about 1,280"
    )
    said = describe_batch(LeMoConfig(), [row], {"attention": [(4096, 4096)]}, [3])
    assert said.endswith("the documents are too short, or have too many labels, to leave any out.")
