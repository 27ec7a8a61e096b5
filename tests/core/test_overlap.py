"""Overlap: its definition written out in plain Python, and what it must not depend on."""

import math
from collections import defaultdict

import pytest
import torch

from lemo_hf import LeMoConfig
from lemo_hf.config import KeepRule
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.predictors.overlap import LENGTHS, NEAR, POWER, overlap_scores
from lemo_hf.predictors.training_free import mix_ranks

SIZE = 8


def defined(ids, asking, hops=1, size=SIZE):
    """The scores of one document, by dictionaries of words."""
    tokens = len(ids)
    blocks = -(-tokens // size)
    places = defaultdict(list)  # of a word
    for length in LENGTHS:
        for i in range(tokens - length + 1):
            places[tuple(ids[i : i + length])].append(i)
    strength = [float(x) for x in asking]
    asks = {i // size for i, asked_for in enumerate(asking) if asked_for}
    wanted = defaultdict(float)
    for _ in range(hops):
        weights = [0.0] * tokens
        for word, where in places.items():
            for i in where:
                wanted[word] = max(wanted[word], min(strength[i : i + len(word)]))
            holders = {i // size: i for i in reversed(where)}  # the first place in each block
            for block, i in holders.items():
                if block not in asks:
                    weights[i] += wanted[word] * math.log(blocks / len(holders)) ** POWER
        found = [sum(weights[max(0, i - NEAR) : i + NEAR + 1]) for i in range(tokens)]
        found = [0.0 if i // size in asks else x for i, x in enumerate(found)]
        most = max(found)
        strength = [x / most if most else 0.0 for x in found]
    scores = [max(found[i : i + size]) for i in range(0, tokens, size)]
    return torch.tensor([most + 1 if i in asks else x for i, x in enumerate(scores)])


def text(tokens=203, words=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, words, (1, tokens), generator=generator)


def asked(tokens, *spans):
    asking = torch.zeros(1, tokens, dtype=torch.bool)
    for start, end in spans:
        asking[:, start:end] = True
    return asking


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("spans", [[(180, 203)], [(0, 10), (90, 91), (100, 112)], []])
def test_overlap_is_the_rarity_of_shared_words_in_the_best_place(hops, spans):
    ids = text()
    asking = asked(203, *spans)
    got = overlap_scores(ids, asking, SIZE, hops=hops)
    truth = defined(ids[0].tolist(), asking[0].tolist(), hops)
    torch.testing.assert_close(got[0], truth, rtol=1e-4, atol=1e-2)  # sums of units of 2^-16
    assert got.shape == (1, 26) and got.dtype == torch.float32
    assert bool(got.any()) == bool(spans)


def test_a_row_scores_the_same_in_any_batch_and_beside_padding():
    ids, asking = text(), asked(203, (190, 203))
    alone = overlap_scores(ids, asking, SIZE)
    pair = overlap_scores(torch.cat([text(seed=1), ids]), torch.cat([asking, asking]), SIZE)
    assert torch.equal(pair[1:], alone)
    valid = torch.arange(240)[None] < 203
    padded = torch.nn.functional.pad(ids, (0, 37), value=7)
    asking = torch.nn.functional.pad(asking, (0, 37), value=True)  # padding that asks finds nothing
    beside = overlap_scores(padded, asking, SIZE, valid)
    torch.testing.assert_close(beside[:, :26], alone)
    assert not beside[:, 26:].any()


def test_documents_of_a_packed_row_score_as_if_alone():
    first, second = text(120, seed=2), text(80, seed=3)
    asks_first, asks_second = asked(120, (100, 120)), asked(80, (0, 20))
    packed = torch.cat([first, second], 1)
    documents = torch.cat([torch.zeros_like(first), torch.ones_like(second)], 1)
    got = overlap_scores(packed, torch.cat([asks_first, asks_second], 1), SIZE, documents=documents)
    alone = [
        overlap_scores(first, asks_first, SIZE)[0],
        overlap_scores(second, asks_second, SIZE)[0],
    ]
    asks = torch.zeros(25, dtype=torch.bool)
    asks[[12, 13, 14, 15, 16, 17]] = True
    assert (got[0, asks] > got[0, ~asks].max()).all()
    torch.testing.assert_close(got[0, ~asks], torch.cat(alone)[~asks])


def test_a_second_hop_finds_a_chain_of_facts():
    """The question names an alias; the alias stands far from the fact, which shares its name."""
    ids = torch.arange(1000, 1000 + 512)[None].clone()  # words that stand once each
    alias, thing, number = [1, 2, 3], [4, 5, 6], [7, 8, 9]
    ids[0, 128:134] = torch.tensor(alias + thing)  # block 16: "the alias is the thing"
    ids[0, 320:326] = torch.tensor(thing + number)  # block 40: "the thing's number is ..."
    ids[0, 504:507] = torch.tensor(alias)
    asking = asked(512, (500, 512))
    one, two = (overlap_scores(ids, asking, SIZE, hops=hops)[0] for hops in (1, 2))
    assert one[16] > 0 and one[40] == 0
    assert one[16] == one[:60].max()
    assert {16, 40} <= set(two[:60].topk(6).indices.tolist())


def labelled(tokens, *spans):
    targets = torch.full((1, tokens), IGNORE_INDEX)
    for start, end in spans:
        targets[:, start:end] = 1
    return targets


def pass_of(ids, targets, **config):
    settings = LeMoConfig(block_size=SIZE, **{"policy": "overlap", **config})
    return SparsePass(settings, tuple(ids.shape), ids.device, input_ids=ids, targets=targets)


def test_blocks_with_labels_and_the_one_before_ask():
    sparse_pass = pass_of(text(160), labelled(160, (83, 90)))  # predicts tokens 84 to 90
    assert sparse_pass.asking_blocks.nonzero()[:, 1].tolist() == [10, 11]
    assert sparse_pass.asking_tokens.nonzero()[:, 1].tolist() == list(range(72, 96))
    whole = pass_of(text(160), labelled(160, (0, 159)))
    assert whole.asking_blocks.all() and not whole.asking_tokens.any()


def test_no_block_before_a_document_asks():
    ids = text(160)
    positions = torch.cat([torch.arange(80), torch.arange(80)])[None]
    sparse_pass = SparsePass(
        LeMoConfig(block_size=SIZE),
        (1, 160),
        ids.device,
        input_ids=ids,
        position_ids=positions,
        targets=labelled(160, (80, 84)),
    )
    assert sparse_pass.asking_tokens.nonzero()[:, 1].tolist() == list(range(80, 88))


def test_the_mix_of_two_scores_holds_the_best_of_both():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 200, generator=generator), torch.rand(2, 200, generator=generator)
    real = torch.ones(2, 200, dtype=torch.bool)
    for share in (0.25, 0.5):
        best = mix_ranks(first, second, share, real).topk(60, 1).indices
        for row in range(2):
            kept = set(best[row].tolist())
            for scores, part in ((first, 1 - share), (second, share)):
                assert set(scores[row].topk(int(60 * part)).indices.tolist()) <= kept


def test_overlap_with_a_random_share_draws_others_at_each_step():
    ids, targets = text(800), labelled(800, (780, 799))

    def kept(step_number, share):
        from lemo_hf.core.policies import POLICIES, ScoreInputs

        sparse_pass = pass_of(ids, targets, random_share=share)
        sparse_pass.global_step = step_number
        inputs = ScoreInputs(
            None, None, 0, "attention", ids[..., None].float(), None, sparse_pass, None
        )
        rule = KeepRule(0.3)
        return sparse_pass.choose(0, "attention", rule, lambda: POLICIES["overlap"](inputs)).blocks

    assert torch.equal(kept(0, 0.0), kept(1, 0.0))
    assert not torch.equal(kept(0, 0.3), kept(1, 0.3))
    assert kept(0, 0.3).sum() == kept(0, 0.0).sum() == 30
    assert (kept(0, 0.3) & kept(1, 0.3)).sum() >= 20  # what is needed stays
