"""What asking blocks look at, against the whole matrix of attention, and in parts."""

import pytest
import torch
from support.parity import materialised_shares

from lemo_hf.predictors import asked_shares as module
from lemo_hf.predictors.asked_shares import asked_shares, asking_index


def inputs(tokens=37, size=8, heads=4, groups=2):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, tokens, 16, generator=generator)
    key = torch.randn(2, heads // groups, tokens, 16, generator=generator)
    asking = torch.rand(2, -(-tokens // size), generator=generator) < 0.5
    asking[:, -1] = True
    return query, key, asking


def blocks_of(shares, index, asks, blocks):
    """``[B, N, N]`` from ``[B, M, N]``."""
    whole = torch.zeros(len(shares), blocks, blocks)
    for b in range(len(shares)):
        whole[b, index[b, asks[b]]] = shares[b, asks[b]]
    return whole


PLACES = torch.arange(37)[None]
CASES = {
    "plain": {},
    "padding": {"valid": (torch.tensor([0, 11])[:, None] <= PLACES)},
    "documents": {"documents": PLACES // torch.tensor([[13], [19]])},
    "window": {"window": 11},
    "softcap": {"softcap": 2.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "groups"), [(8, 2), (1, 1), (12, 4)])
def test_shares_are_those_of_the_definition(case, size, groups, monkeypatch):
    query, key, asking = inputs(size=size, groups=groups)
    options = {"valid": None, "documents": None, "window": None, "softcap": None, **CASES[case]}
    if options["valid"] is not None:
        pad = torch.nn.functional.pad(options["valid"], (0, -37 % size))
        asking = asking & pad.unflatten(1, (-1, size)).any(2)
    truth = materialised_shares(query, key, asking, size, 0.3, **options)
    most = int(asking.sum(1).max())
    for limit in (2**25, 1):  # all at once, and one asking block at a time
        monkeypatch.setattr(module, "LOGITS", limit)
        index, asks = asking_index(asking, most + 1)
        parts = list(asked_shares(query, key, index, asks, size, 0.3, **options))
        assert len(parts) == (1 if limit > 1 else most + 1)
        got = torch.cat(parts, 1)
        assert torch.equal(got.sum(2) > 0, asks)
        whole = blocks_of(got, index, asks, asking.shape[1])
        torch.testing.assert_close(whole, truth.float(), rtol=1e-4, atol=1e-6)


def test_each_asking_block_gives_one_unit_to_blocks_before_it():
    query, key, asking = inputs()
    index, asks = asking_index(asking, 5)
    assert torch.equal(asks.sum(1), asking.sum(1))
    shares = torch.cat(list(asked_shares(query, key, index, asks, 8, 1.0)), 1)
    torch.testing.assert_close(shares.sum(2), asks.float())
    later = torch.arange(5) > index[..., None]
    assert (shares[later] == 0).all()


def test_a_key_that_one_head_wants_is_found_among_many_that_do_not():
    """Means over heads would drown it."""
    query, key = 0.1 * torch.randn(1, 8, 64, 16), 0.1 * torch.randn(1, 8, 64, 16)
    query[0, 5, 61], key[0, 5, 19] = 6.0, 6.0
    index, asks = torch.tensor([[7]]), torch.tensor([[True]])
    (shares,) = asked_shares(query, key, index, asks, 8, 0.25)
    assert shares[0, 0].argmax() == 2
