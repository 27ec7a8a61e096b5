"""Groups of blocks that one image reaches through, against a definition by loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo_hf.batch.images import block_groups, image_tokens, together
from lemo_hf.batch.selection import blocks_above, keep_blocks

ROWS = st.lists(st.sampled_from("..iI"), min_size=1, max_size=60)


def numbers(groups):
    return groups[0].tolist()


def by_hand(row, size):
    """Groups of one row of image tokens, 1 for one, by walking along it."""
    row = list(row)
    for i in range(1, len(row) - 1):
        if not row[i] and row[i - 1] and row[i + 1] == 1:
            row[i] = 2  # stands between two tokens of an image
    group, found = 0, [0]
    for start in range(size, len(row), size):
        group += not (row[start - 1] and row[start])
        found.append(group)
    return found


@given(ROWS, st.integers(1, 9))
def test_groups_are_those_found_by_walking(row, size):
    tokens = [int(x != ".") for x in row]
    found = block_groups(torch.tensor([tokens]).bool(), size)
    assert numbers(found) == by_hand(tokens, size)


def test_a_break_within_an_image_does_not_end_it_and_two_tokens_do():
    images = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1]]).bool()
    assert numbers(block_groups(images, 3)) == [0, 0, 1, 1]


def test_an_image_is_required_if_a_part_of_it_is():
    groups = torch.tensor([[0, 1, 1, 1, 2, 3, 3]])
    required = torch.tensor([[1, 0, 0, 1, 0, 0, 0]]).bool()
    assert together(required, groups).int().tolist() == [[1, 1, 1, 1, 0, 0, 0]]


@given(st.data(), st.integers(1, 20))
def test_groups_are_kept_whole_within_the_budget(data, blocks):
    joins = data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks))
    groups = (~torch.tensor([joins]) | (torch.arange(blocks) == 0)).cumsum(1) - 1
    scores = torch.tensor(
        [data.draw(st.lists(st.integers(-5, 5), min_size=blocks, max_size=blocks))]
    )
    first = torch.arange(blocks)[None] == 0
    required = together(first, groups)
    budget = data.draw(st.integers(int(required.sum()), blocks))
    real = torch.ones_like(first)
    kept = keep_blocks(scores, real, required, budget, groups=groups)
    assert kept.sum() <= budget
    assert not (required & ~kept).any()
    assert torch.equal(together(kept, groups), kept)
    # No block that stands alone is left out while there is room for it.
    counts = torch.bincount(groups[0])[groups]
    left_out = (counts == 1) & ~kept
    assert kept.sum() == budget or not left_out.any()
    # And none that stands alone scores better than one that is kept and stands alone.
    alone = (counts == 1) & kept & ~required
    if left_out.any() and alone.any():
        assert scores[left_out].max() <= scores[alone].min()
    if budget == blocks:
        assert kept.all()


@given(st.data(), st.integers(1, 20))
def test_blocks_that_all_stand_alone_are_kept_as_without_groups(data, blocks):
    scores = torch.tensor(
        [data.draw(st.lists(st.integers(-5, 5), min_size=blocks, max_size=blocks))]
    )
    real, required = torch.ones_like(scores).bool(), torch.zeros_like(scores).bool()
    groups, budget = torch.arange(blocks)[None], data.draw(st.integers(0, blocks))
    expected = keep_blocks(scores, real, required, budget)
    assert torch.equal(keep_blocks(scores, real, required, budget, groups=groups), expected)


def test_the_image_that_scores_best_on_average_is_kept():
    groups = torch.tensor([[0, 1, 1, 2, 3, 3, 4]])
    scores = torch.tensor([[0.0, 9, 0, 4, 5, 6, 0]])
    real, none = torch.ones_like(groups).bool(), torch.zeros_like(groups).bool()
    kept = [
        keep_blocks(scores, real, none, n, groups=groups).int().tolist()[0] for n in range(1, 6)
    ]
    assert kept == [
        [0, 0, 0, 1, 0, 0, 0],  # the best that one block holds
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 1, 1, 0, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 0],
    ]


@pytest.mark.parametrize("threshold", [0.5, 1.0, 1.5])
def test_a_threshold_compares_what_a_group_is_on_average(threshold):
    groups = torch.tensor([[0, 1, 1, 2, 3, 3]])
    scores = torch.tensor([[1.0, 3, 1, 0.5, 0, 0.5]])  # mean 1; of groups 1, 2, 0.5, 0.25
    real, none = torch.ones_like(groups).bool(), torch.zeros_like(groups).bool()
    kept = blocks_above(scores, real, none, threshold, groups=groups)
    means = torch.tensor([[1.0, 2, 2, 0.5, 0.25, 0.25]])
    assert torch.equal(kept, means >= threshold)


def test_tokens_of_all_kinds_are_found():
    class Config:
        image_token_id, video_token_id, audio_token_id = 7, 8, None

    ids = torch.tensor([[1, 7, 7, 8, 9]])
    assert image_tokens(ids, Config()).int().tolist() == [[0, 1, 1, 1, 0]]
