"""Thresholds: kept blocks follow the scores, and rows of a batch keep different numbers of them."""

import pytest
import torch
from support.batches import compare, completion_only, left_padded, packed, plain, right_padded
from support.grids import covering
from support.models import loss_and_gradients, make_model, relative_error, with_lora

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.batch.selection import blocks_above
from lemo_hf.config import LEVELS, KeepRule
from lemo_hf.core.sparse_pass import SparsePass


def config(threshold, **options):
    settings = {"block_size": 8, "agree_across_layers": False, "segment_size": 50, **options}
    return LeMoConfig(threshold=threshold, **settings)


def run(model, inputs, settings):
    """Loss, gradients, what was kept, and the report of one sparse pass."""
    lemo = apply_lemo(model, settings)
    try:
        loss, gradients = loss_and_gradients(model, **inputs)
        return loss, gradients, lemo.passes.tally.kept_blocks, lemo.report()
    finally:
        remove_lemo(model)


def test_blocks_above_by_hand():
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor(
        [[4.0, 1, 0, 2, 1, 0, 9], [nan, 8, 0, 1, 1, 2, 0], [0, inf, 1, 0, 0, 0, 0]]
    )
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 0]] * 3).bool()  # means 8/6, 2 and beyond any float
    required = torch.tensor([[0, 0, 1, 0, 0, 0, 0]] * 3).bool()
    above = blocks_above(scores, real, required, 1.0)
    assert [row.nonzero().flatten().tolist() for row in above] == [[0, 2, 3], [1, 2, 5], [1, 2]]
    assert torch.equal(blocks_above(scores, real, required, 0.0), real)
    scale = torch.tensor([[1e-3], [7.0], [1.0]])
    assert torch.equal(blocks_above(scores * scale, real, required, 1.0), above)
    nothing = torch.zeros(1, 4)  # no block is below the mean: there is nothing to choose by
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert blocks_above(nothing, everything, ~everything, 5.0).all()


def test_a_batch_has_the_slots_that_its_longest_row_needs():
    sparse_pass = SparsePass(config(1.0, block_size=4), (3, 22), torch.device("cpu"))
    scores = torch.tensor([[0.0, 9, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 9]])
    kept = sparse_pass.choose(0, "attention", KeepRule(threshold=1.0), lambda: scores)
    assert kept.index.shape == (3, 22) and kept.slot_mask.sum(1).tolist() == [4 + 4 + 2, 22, 6]
    assert kept.index[0, :10].tolist() == [*range(8), 20, 21] and kept.kept_tokens == 38
    alone = SparsePass(config(1.0, block_size=4), (1, 22), torch.device("cpu"))
    kept = alone.choose(0, "attention", KeepRule(threshold=1.0), lambda: scores[:1])
    assert kept.index.shape == (1, 10) and kept.slot_mask is None


@pytest.mark.parametrize("case", [plain, left_padded, right_padded, packed, completion_only])
def test_equals_masked_dense_layers(case, monkeypatch):
    compare(with_lora(make_model("llama")), case(), config(1.0), monkeypatch)


@pytest.mark.parametrize(
    ("policy", "mlp", "agree", "recompute"),
    covering(
        ["oracle", "pooled", "random", "overlap", "window"],
        [{}, {"mlp_threshold": 1.02}, {"mlp_retention": 0.3}],
        [False, True],
        LEVELS,
    ),
)
def test_every_policy_and_way_of_sharing(policy, mlp, agree, recompute, monkeypatch):
    settings = config(0.9, policy=policy, agree_across_layers=agree, recompute=recompute, **mlp)
    compare(with_lora(make_model("llama")), left_padded(), settings, monkeypatch)


@pytest.mark.parametrize("agree", [False, True])
def test_checkpointing_changes_nothing(agree):
    model = with_lora(make_model("llama", "sdpa"))
    settings = dict(agree_across_layers=agree, mlp_threshold=1.0)
    plain_run = run(model, left_padded(), config(1.1, recompute="none", **settings))
    again = run(model, left_padded(), config(1.1, recompute="full", **settings))
    assert again[0] == pytest.approx(plain_run[0], rel=1e-6)
    for name, gradient in plain_run[1].items():
        assert relative_error(again[1][name], gradient) < 1e-5, name


@pytest.mark.parametrize("mlp", [{}, {"mlp_threshold": 1.0}])
def test_rows_of_a_batch_equal_each_row_alone(mlp):
    """Each row keeps its own number of blocks; alone it has no padding and no idle slots."""
    model = with_lora(make_model("llama"))
    settings = config(0.9, **mlp)
    inputs = right_padded()
    together = run(model, inputs, settings)
    losses, gradients, counts = [], [], []
    for row, tokens in enumerate((70, 61, 45)):
        part = {name: value[row : row + 1, :tokens] for name, value in inputs.items()}
        loss, gradient, blocks, _ = run(model, part, settings)
        for key, kept in blocks.items():
            width = kept.shape[1]
            assert torch.equal(together[2][key][row : row + 1, :width], kept)
            assert not together[2][key][row, width:].any()
        counts.append(tuple(int(kept.sum()) for kept in blocks.values()))
        losses.append(loss * (tokens - 1))
        gradients.append({name: value * (tokens - 1) for name, value in gradient.items()})
    assert len(set(counts)) == 3
    total = 69 + 60 + 44
    assert together[0] == pytest.approx(sum(losses) / total, rel=1e-6)
    for name, gradient in together[1].items():
        expected = sum(part[name] for part in gradients) / total
        assert relative_error(gradient, expected) < 1e-5, name


@pytest.mark.parametrize("mlp", [{}, {"mlp_threshold": 0.0}])
@pytest.mark.parametrize("case", [plain, right_padded, packed])
def test_threshold_0_is_the_stock_model(mlp, case):
    model = with_lora(make_model("llama"))
    loss, gradients = loss_and_gradients(model, **case(), use_cache=False)
    sparse_loss, sparse_gradients, _, report = run(model, case(), config(0.0, **mlp))
    assert sparse_loss == pytest.approx(loss, rel=1e-6)
    assert all(relative_error(sparse_gradients[n], gradients[n]) < 2e-6 for n in gradients)
    assert report["attention_retention"] == report["mlp_retention"] == 1


def test_a_huge_threshold_keeps_only_what_must_be_kept():
    blocks = run(make_model("llama"), left_padded(), config(1e9, mlp_threshold=1e9))[2]
    assert len(blocks) == 8
    for kept in blocks.values():
        rows = [row.nonzero().flatten().tolist() for row in kept]
        assert rows == [[0, 8], [1, 8], [3, 8]]  # 0, 9 and 25 tokens of padding on the left
    # Answers of 4, 20 and 50 tokens, with the token before that predicts their first.
    answers = run(make_model("llama"), completion_only(), config(1e9))[2]
    for kept in answers.values():
        assert kept.sum(1).tolist() == [2, 4, 8]


def test_each_layer_has_its_own_threshold():
    _, _, blocks, report = run(make_model("llama"), plain(), config((0, 0.5, 1, 1e9)))
    counts = [int(blocks[layer, "attention"].sum()) for layer in range(4)]
    assert counts[0] == 27 and counts[3] == 6 and 6 < counts[2] <= counts[1]
    assert counts[2] < 27
    assert report["attention_retention"] < 1


def test_the_plan_says_threshold():
    lemo = apply_lemo(make_model("llama"), config((0, 0.5, 1, 2), mlp_threshold=1.0))
    assert "attention threshold 0 to 2, MLP threshold 1," in lemo.describe()
