"""Budgets, always-kept blocks and kept sets."""

from types import SimpleNamespace

import pytest
import torch

from lemo_hf.batch.selection import block_any, blocks_above, keep_blocks, kept_set, num_kept_blocks
from lemo_hf.config import KeepRule, LeMoConfig
from lemo_hf.core.loss import supervised
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX


def make_pass(shape, retention=0.5, block_size=4, **inputs):
    config = LeMoConfig(retention=retention, block_size=block_size, policy="recent")
    return SparsePass(config, shape, torch.device("cpu"), **inputs)


def kept_tokens(sparse_pass, scores, retention=0.5):
    """Positions kept in each row, idle slots left out."""
    kept = sparse_pass.choose(0, "attention", KeepRule(retention), lambda: scores)
    slots = [True] * kept.index.shape[1]
    return [
        [i for i, live in zip(row, slots if mask is None else mask, strict=True) if live]
        for row, mask in zip(
            kept.index.tolist(),
            [None] * sparse_pass.batch if kept.slot_mask is None else kept.slot_mask.tolist(),
            strict=True,
        )
    ]


@pytest.mark.parametrize(
    ("retention", "blocks", "kept"),
    [(0.5, 8, 4), (0.5, 7, 4), (0.3, 10, 3), (0.7, 10, 7), (0.01, 10, 1), (1.0, 9, 9), (0.5, 0, 0)],
)
def test_num_kept_blocks_rounds_up_but_not_by_a_rounding_error(retention, blocks, kept):
    assert num_kept_blocks(retention, blocks) == kept


def test_block_any_counts_a_short_last_block():
    tokens = torch.tensor([[0, 0, 0, 1, 0, 0, 1]]).bool()
    assert block_any(tokens, 3).tolist() == [[False, True, True]]


def test_keep_blocks_takes_required_then_best_then_earlier():
    scores = torch.tensor([[1.0, 9.0, 5.0, 5.0, 0.0], [float("nan"), 2.0, 1.0, 3.0, 8.0]])
    required = torch.tensor([[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]).bool()
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    keep = keep_blocks(scores, real, required, torch.tensor([[3], [2]]))
    assert keep.tolist() == [[False, True, True, False, True], [True, False, False, True, False]]


def test_first_and_last_blocks_are_always_kept():
    scores = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 0]])
    sparse_pass = make_pass((1, 30))
    assert kept_tokens(sparse_pass, scores) == [[0, 1, 2, 3, *range(20, 30)]]


def test_a_budget_below_the_required_blocks_gives_way():
    sparse_pass = make_pass((1, 32), retention=0.01)
    assert kept_tokens(sparse_pass, torch.zeros(1, 8), 0.01) == [[0, 1, 2, 3, 28, 29, 30, 31]]


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_never_kept_and_never_counted(left):
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, slice(0, 13) if left else slice(19, 32)] = 0
    sparse_pass = make_pass((2, 32), attention_mask=mask)
    rows = kept_tokens(sparse_pass, torch.rand(2, 8))
    assert sparse_pass.real_tokens == 32 + 19
    real = mask[1].nonzero().flatten().tolist()
    assert set(rows[1]) <= set(real)
    assert {real[0], real[-1]} <= set(rows[1])
    # 19 tokens touch 5 blocks, of which half are kept: 3, the two at the ends cut short or not.
    assert len(rows[0]) == 16 and len(rows[1]) == (3 + 4 + 4)
    assert all(row == sorted(row) for row in rows)


def test_a_row_keeps_the_same_whatever_stands_beside_it():
    scores = torch.rand(1, 8)
    mask = torch.ones(1, 32, dtype=torch.long)
    mask[:, 22:] = 0
    alone = kept_tokens(make_pass((1, 32), attention_mask=mask), scores)
    pair = torch.cat([torch.ones_like(mask), mask])
    beside = kept_tokens(make_pass((2, 32), attention_mask=pair), scores.expand(2, -1))
    assert beside[1] == alone[0]


def test_a_row_of_padding_alone_keeps_nothing():
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1] = 0
    rows = kept_tokens(make_pass((2, 16), attention_mask=mask), torch.rand(2, 4))
    assert rows[1] == [] and len(rows[0]) == 8


def test_blocks_with_answers_are_kept_and_the_context_pays():
    targets = torch.full((1, 40), IGNORE_INDEX)
    targets[0, 27] = targets[0, 28] = 7  # predicted at 27 and 28: tokens 28 and 29 are the answer
    sparse_pass = make_pass((1, 40), targets=targets)
    (row,) = kept_tokens(sparse_pass, torch.tensor([[0.0, 9, 8, 7, 6, 5, 0, 0, 4, 0]]))
    assert row == [0, 1, 2, 3, 4, 5, 6, 7, *range(24, 32), *range(36, 40)]


def test_answers_beyond_the_budget_win_and_are_noted():
    targets = torch.full((1, 40), IGNORE_INDEX)
    targets[0, 8:32] = 7
    sparse_pass = make_pass((1, 40), targets=targets)
    (row,) = kept_tokens(sparse_pass, torch.zeros(1, 10))
    assert set(range(8, 33)) <= set(row)
    assert (
        "labels in 7 of its 10 blocks, more than retention 0.5 allows (5)" in sparse_pass.exceeded
    )


def test_labels_on_the_whole_sequence_bind_nothing():
    """Packed rows ignore the first label of each document; that is no completion-only batch."""
    targets = torch.arange(40)[None].clone()
    targets[0, [12, 39]] = IGNORE_INDEX
    sparse_pass = make_pass((1, 40), targets=targets)
    (row,) = kept_tokens(sparse_pass, torch.rand(1, 10))
    assert len(row) == 20 and sparse_pass.exceeded is None


def test_kept_set_puts_idle_slots_last():
    tokens = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0]]).bool()
    kept = kept_set(tokens, tokens, 3, exact=False, shared=False)
    assert kept.index[0].tolist() == [0, 2, 4] and kept.index[1, 0] == 3
    assert len(set(kept.index[1].tolist())) == 3
    assert kept.slot_mask.tolist() == [[True] * 3, [True, False, False]]
    assert kept.kept_tokens == 4


def test_supervised_tokens_were_kept_as_often_as_the_mean():
    sparse_pass = make_pass((1, 16))
    sparse_pass.times_kept += torch.tensor([[3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]])
    assert supervised(sparse_pass).tolist() == [[True] * 4 + [False] * 8 + [True] * 4]


def packed(*sizes):
    """Positions of documents of so many tokens, and each block's document (blocks of 4)."""
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    ids = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    return positions, ids[2::4][None]


def test_each_document_keeps_its_share():
    documents = torch.tensor([[0] * 12 + [1] * 20 + [2] * 8])
    nothing = torch.zeros(1, 40, dtype=torch.bool)
    for seed in range(20):
        # Scores of one document are far above those of another: only ranks within one count.
        scores = torch.rand(1, 40, generator=torch.Generator().manual_seed(seed))
        scores = scores + 10 * ((documents + seed) % 3)
        keep = keep_blocks(scores, ~nothing, nothing, 20, documents)
        assert [int(keep[documents == i].sum()) for i in range(3)] == [6, 10, 4]
        for i in range(3):
            inside = documents[0] == i
            assert scores[0, inside & keep[0]].min() > scores[0, inside & ~keep[0]].max()


@pytest.mark.parametrize("policy", ["recent", "window", "chunks", "random", "auto"])
def test_no_policy_leaves_out_a_document_its_beginning_or_its_end(policy):
    from lemo_hf.core.policies import POLICIES, ScoreInputs

    positions, documents = packed(80, 160, 40, 200)
    ids = torch.arange(480)[None]
    config = LeMoConfig(retention=0.5, block_size=4, chunk_size=8, policy=policy)
    for number in range(5):
        sparse_pass = SparsePass(
            config,
            (1, 480),
            ids.device,
            input_ids=ids,
            position_ids=positions,
            targets=ids,
            global_step=number,
        )
        inputs = ScoreInputs(
            None, None, 0, "attention", ids[..., None].float(), None, sparse_pass, None
        )
        score = POLICIES[policy]
        blocks = sparse_pass.choose(
            0, "attention", KeepRule(0.5), lambda score=score, inputs=inputs: score(inputs)
        ).blocks
        assert blocks.sum() == 60
        for i, size in enumerate((20, 40, 10, 50)):
            kept = blocks[documents == i]
            assert kept[0] and kept[-1] and abs(int(kept.sum()) - size // 2) <= 1


def test_a_recent_document_keeps_its_own_last_blocks():
    positions, _ = packed(32, 32)
    sparse_pass = make_pass((1, 64), position_ids=positions)
    (row,) = kept_tokens(sparse_pass, torch.arange(16).float()[None])
    assert row == [*range(4), *range(20, 36), *range(52, 64)]


def test_a_packed_row_scores_thresholds_inside_each_document():
    scores = torch.tensor([[1.0, 3, 1, 3, 10, 30, 10, 30]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    nothing = torch.zeros(1, 8, dtype=torch.bool)
    keep = blocks_above(scores, ~nothing, nothing, 1.0, documents)
    assert keep.tolist() == [[False, True] * 4]


def test_no_label_is_lost_to_rounding():
    """In fp32 the mean of 27 over so many tokens is more than 27."""
    tokens = 621_381
    kept_by_all = SimpleNamespace(
        times_kept=torch.full((1, tokens), 27, dtype=torch.int32),
        row_tokens=torch.tensor([[tokens]]),
        valid=None,
    )
    assert supervised(kept_by_all).all()
