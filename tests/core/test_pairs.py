"""Batches of pairs: the same of the prompt for both rows, and the same in any batch."""

import pytest
import torch
from support.dense_reference import recorded_sets
from support.models import make_model

from lemo_hf import LeMoConfig
from lemo_hf.batch.pairs import pair_budgets, pair_scores, partners
from lemo_hf.batch.row_counts import RowCounts
from lemo_hf.core.pair_sets import PairSets
from lemo_hf.patch import apply_lemo

SIZE = 8


def pairs(lengths, tokens=None, seed=0):
    """A batch as TRL makes it, of ``(prompt, chosen, rejected)`` tokens a pair."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[], []]
    for prompt, *answers in lengths:
        # Few words, so that blocks of a long prompt share some with an answer.
        ids = torch.randint(3, 97, (prompt,), generator=generator)
        for place, length in zip(rows, answers, strict=True):
            answer = torch.randint(3, 97, (length,), generator=generator)
            labels = torch.cat([torch.full((prompt,), -100), answer])
            place.append((torch.cat([ids, answer]), labels))
    rows = rows[0] + rows[1]
    tokens = tokens or max(len(ids) for ids, _ in rows)
    batch = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    for name, fill in batch.items():
        column = torch.full((len(rows), tokens), fill)
        for i, (ids, labels) in enumerate(rows):
            value = {"input_ids": ids, "labels": labels}.get(name, torch.ones_like(ids))
            column[i, : len(ids)] = value
        batch[name] = column
    return batch


def kept_by(config, batch, monkeypatch, pairs=True, step=0):
    """What the first layer keeps: ``[B, T]`` bool."""
    model = make_model("llama")
    lemo = apply_lemo(model, config)
    lemo.passes.pairs = PairSets() if pairs else None
    lemo.begin_step(step)
    with recorded_sets(monkeypatch) as chosen:
        model(**batch)
    return chosen[0][1]


LENGTHS = [(70, 9, 30), (100, 41, 3), (10, 40, 50), (64, 8, 8)]
POLICIES = ["auto", "overlap", "chunks", "random", "window", "recent", "pooled", "oracle"]


@pytest.mark.parametrize("retention", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_both_rows_keep_the_same_of_their_prompt(policy, retention, monkeypatch):
    batch = pairs(LENGTHS)
    config = LeMoConfig(retention=retention, policy=policy, block_size=SIZE)
    kept = kept_by(config, batch, monkeypatch)
    whole = batch["labels"] != -100
    assert kept[whole].all() and not (kept & ~batch["attention_mask"].bool()).any()
    for i, (prompt, *answers) in enumerate(LENGTHS):
        assert torch.equal(kept[i, :prompt], kept[i + 4, :prompt])
        for row, answer in zip((i, i + 4), answers, strict=True):
            blocks = -(-(prompt + answer) // SIZE)
            required = blocks - (prompt - 1) // SIZE + 1
            most = max(-(-round(retention * blocks, 6) // 1), required)
            assert int(kept[row].sum()) <= most * SIZE
    assert (retention == 1) == torch.equal(kept, batch["attention_mask"].bool())


@pytest.mark.parametrize("policy", ["auto", "overlap", "chunks", "random", "window", "recent"])
def test_a_pair_keeps_the_same_in_any_batch(policy, monkeypatch):
    """However much padding there is, and whoever else is in the batch."""
    config = LeMoConfig(retention=0.5, policy=policy, block_size=SIZE, chunk_size=2 * SIZE)
    batch, wide = pairs(LENGTHS), pairs(LENGTHS, tokens=333)
    kept = kept_by(config, batch, monkeypatch)
    tokens = kept.shape[1]
    assert torch.equal(kept, kept_by(config, wide, monkeypatch)[:, :tokens])
    turned = torch.tensor([2, 0, 6, 4])
    few = {name: value[turned] for name, value in batch.items()}
    assert torch.equal(kept[turned], kept_by(config, few, monkeypatch))


@pytest.mark.parametrize("policy", ["auto", "overlap"])
def test_a_row_with_answers_keeps_the_same_however_it_is_padded(policy, monkeypatch):
    """Padding takes no place in what is left to chance. (Not of pairs: what SFT trains.)"""
    runs = {"block_size": SIZE, "chunk_size": 2 * SIZE}
    config = LeMoConfig(retention=0.5, policy=policy, random_share=0.25, **runs)
    lengths = [(150, 9, 30), (200, 20, 3)]
    batch, wide = pairs(lengths), pairs(lengths, tokens=555)
    kept = kept_by(config, batch, monkeypatch, pairs=False)
    padded = kept_by(config, wide, monkeypatch, pairs=False)
    assert torch.equal(kept, padded[:, : kept.shape[1]])


def test_scores_of_a_pair_are_the_best_of_both():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 100, generator=generator)
    scores[2:] = scores[2:] * 1000 - 500  # of another scale
    scores[0, 5] = float("nan")
    prompt = torch.arange(100).expand(4, -1) < 60
    found = pair_scores(scores, prompt)
    assert torch.equal(found[:2, :60], found[2:, :60])
    assert (found[:, :60].amin(1) > found[:, 60:].amax(1)).all()
    for k in (10, 20, 40):
        best = found.topk(k, 1).indices
        for row in range(2):
            kept = set(best[row].tolist())
            for each in (scores[row], scores[row + 2]):
                each = each.nan_to_num(nan=-1e9)[:60]
                assert set(each.topk(k // 2).indices.tolist()) <= kept
    assert 5 not in found.topk(40, 1).indices[0].tolist() or scores[2, 5] > scores[2, :60].median()


def test_budgets_leave_both_prompts_the_same_room():
    rows = [RowCounts(800, 100, 11, 88, 10, 80), RowCounts(960, 120, 31, 248, 30, 240)]
    assert pair_budgets([50, 60], rows) == [10 + 30, 60]
    assert pair_budgets([20, 31], rows) == [11, 31]  # of each prompt the first block, as required


def test_a_reference_keeps_what_the_policy_kept(monkeypatch):
    """Whatever it would choose itself: its own policy is another, and its dtype."""
    model, reference = make_model("llama"), make_model("llama", vocab_size=97).double().eval()
    sets = PairSets()
    for each, policy in ((model, "random"), (reference, "recent")):
        config = LeMoConfig(retention=0.5, policy=policy, block_size=SIZE)
        apply_lemo(each, config).passes.pairs = sets
    batch = pairs(LENGTHS)
    with recorded_sets(monkeypatch) as chosen:
        model(**batch)
        with torch.no_grad():
            loss = reference(**batch).loss
    assert loss > 0 and len(chosen) == 8
    assert all(torch.equal(mask, chosen[0][1]) for _, mask in chosen)
    sets.latest = None
    with recorded_sets(monkeypatch) as chosen, torch.no_grad():
        reference(**batch)
    assert not chosen


def test_fixed_sets_do_not_follow_the_steps(monkeypatch):
    batch = pairs(LENGTHS)
    config = LeMoConfig(retention=0.5, policy="random", block_size=SIZE)
    model = make_model("llama")
    lemo = apply_lemo(model, config)
    found = {}
    for fixed in (False, True):
        lemo.passes.pairs = PairSets(fixed=fixed)
        for step in (0, 1):
            lemo.begin_step(step)
            with recorded_sets(monkeypatch) as chosen:
                model(**batch)
            found[fixed, step] = chosen[0][1]
    assert not torch.equal(found[False, 0], found[False, 1])
    assert torch.equal(found[True, 0], found[True, 1])
    assert torch.equal(found[True, 0], found[False, 0])


def test_partners_are_half_a_batch_apart():
    assert partners(torch.arange(6)).tolist() == [3, 4, 5, 0, 1, 2]
