"""Random batches against definitions in fp64 that share no code: sets, loss, and a whole pass.

``LEMO_CASES`` is the number of cases a property, of whole passes a quarter: 500, the same ones,
unless ``make soak`` asks for more, which are others at each call.
"""

import math
import os
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.dense_reference import expected_loss, masked_dense, recorded_sets
from support.models import make_model

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.config import KeepRule
from lemo_hf.core.family import Family
from lemo_hf.core.loss import segment_loss, shifted
from lemo_hf.core.sparse_pass import SparsePass

CASES = int(os.environ.get("LEMO_CASES", "500"))
CPU = torch.device("cpu")
VOCABULARY = 97


def cases(number):
    return settings(
        max_examples=number,
        derandomize="LEMO_CASES" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@dataclass
class Batch:
    """A batch, and what its rows are: ``lengths`` of tokens, or of documents where it is packed."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None

    @property
    def real(self):
        return torch.ones_like(self.ids).bool() if self.mask is None else self.mask.bool()

    @property
    def documents(self):
        """Ids ``[B][T]``; a document begins where positions begin anew."""
        if self.positions is None:
            return [[0] * self.ids.shape[1] for _ in self.ids]
        return (self.positions == 0).cumsum(1).tolist()


@st.composite
def batches(draw, most=80):
    """Rows padded on either side or not, or packed; labels everywhere, somewhere, nowhere, or but
    at both ends, whose blocks are always kept."""
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, most))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=chance)
    mask = positions = None
    shape = draw(st.sampled_from(["plain", "left", "right", "packed"]))
    if shape in ("left", "right"):
        mask = torch.ones_like(ids)
        for row in range(rows):
            padding = draw(st.integers(0, tokens))
            mask[row, slice(0, padding) if shape == "left" else slice(tokens - padding, None)] = 0
    if shape == "packed":
        cuts = [sorted(draw(st.sets(st.integers(1, tokens), max_size=5))) for _ in range(rows)]
        positions = torch.stack([_positions(tokens, row) for row in cuts])
    labels = ids.clone()
    for row in range(rows):
        kind = draw(st.sampled_from(["all", "first", "last", "some", "ends", "none"]))
        cut = draw(st.integers(0, tokens))
        if kind == "first":
            labels[row, cut:] = -100
        elif kind == "last":
            labels[row, :cut] = -100
        elif kind == "some":
            share = draw(st.floats(0, 1))
            labels[row, torch.rand(tokens, generator=chance) < share] = -100
        elif kind == "ends":
            few = draw(st.integers(1, 4))
            labels[row, : few + 1] = labels[row, tokens - few :] = -100
        elif kind == "none":
            labels[row] = -100
    if mask is not None and draw(st.booleans()):
        labels[mask == 0] = -100  # as most collators do
    return Batch(ids, labels, mask, positions)


def _positions(tokens, cuts):
    bounds = [0, *(cut for cut in cuts if cut < tokens), tokens]
    lengths = [end - start for start, end in pairwise(bounds)]
    return torch.cat([torch.arange(n) for n in lengths])


def kept_by_definition(scores, tokens, documents, predicting, size, retention):
    """Blocks that one row keeps, by the words of docs/how-it-works.md.

    Returns:
        What must be kept, and how many are.
    """
    blocks = range(-(-len(tokens) // size))
    inside = [range(b * size, min((b + 1) * size, len(tokens))) for b in blocks]
    real = [b for b in blocks if any(tokens[t] for t in inside[b])]
    if not real:
        return set(), 0, real, {}
    middle = [min(b * size + size // 2, len(tokens) - 1) for b in blocks]
    document = {b: documents[middle[b]] for b in real}
    must = set()
    for number in set(document.values()):
        own = [b for b in real if document[b] == number]
        must |= {own[0], own[-1]}
    asked = [t for t in range(len(tokens)) if predicting[t] and tokens[t]]
    if len(asked) < 0.9 * (sum(tokens) - 1):
        answers = [t + 1 for t in asked if t + 1 < len(tokens) and tokens[t + 1]]
        must |= {t // size for t in (*asked, *answers)}
    for number in set(document.values()):
        holding = [b for b in real if document[b] == number and any(t in inside[b] for t in asked)]
        if holding and not must & set(holding):
            must.add(holding[-1])
    budget = math.ceil(round(retention * len(real), 6))
    return must, max(budget, len(must)), real, document


@cases(CASES)
@given(
    batches(),
    st.one_of(st.integers(1, 4), st.integers(1, 24)),
    st.one_of(st.floats(0.01, 0.15), st.floats(0.01, 1)),  # often what is always kept alone
    st.integers(0, 2**31),
    st.booleans(),
)
def test_sets(batch, size, retention, seed, ties):
    scores = torch.randn(
        batch.ids.shape[0],
        -(-batch.ids.shape[1] // size),
        generator=torch.Generator().manual_seed(seed),
    )
    scores = scores.round() if ties else scores
    targets = shifted(batch.labels)
    sparse_pass = SparsePass(
        LeMoConfig(retention=retention, block_size=size, policy="recent"),
        tuple(batch.ids.shape),
        CPU,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        targets=targets,
    )
    kept = sparse_pass.choose(0, "attention", KeepRule(retention), lambda: scores)
    for row, tokens in enumerate(batch.real.tolist()):
        predicting = (targets[row] != -100).tolist()
        must, count, real, document = kept_by_definition(
            scores[row], tokens, batch.documents[row], predicting, size, retention
        )
        blocks = kept.blocks[row].nonzero().flatten().tolist()
        assert set(blocks) <= set(real) and must <= set(blocks) and len(blocks) == count
        for left_out in set(real) - set(blocks):  # the best of their document, earlier ones first
            others = [b for b in blocks if b not in must and document[b] == document[left_out]]
            score = scores[row].tolist()
            assert all((-score[b], b) < (-score[left_out], left_out) for b in others)
        expected = [t for t in range(len(tokens)) if tokens[t] and t // size in blocks]
        live = slice(None) if kept.slot_mask is None else kept.slot_mask[row]
        assert kept.index[row][live].tolist() == expected
        assert any(predicting[t] for t in expected) == any(
            p and t for p, t in zip(predicting, tokens, strict=True)
        )


@cases(CASES)
@given(
    batches(),
    st.integers(0, 2**31),
    st.sampled_from(["kept", "all"]),
    st.sampled_from([None, 1.0, 2.5]),
    st.sampled_from([None, 3.0]),
    st.one_of(st.none(), st.integers(1, 500)),
    st.sampled_from([None, 1, 7]),
)
def test_loss(batch, seed, supervise, divisor, softcap, items, segment):
    chance = torch.Generator().manual_seed(seed)
    shape, targets = batch.ids.shape, shifted(batch.labels)
    config = LeMoConfig(block_size=8, supervise=supervise, segment_size=segment)
    sparse_pass = SparsePass(config, tuple(shape), CPU, attention_mask=batch.mask, targets=targets)
    sparse_pass.times_kept = (
        torch.randint(0, 3, shape, generator=chance, dtype=torch.int32) * batch.real
    )
    hidden = torch.randn(*shape, 6, generator=chance, dtype=torch.float64).requires_grad_()
    head = torch.nn.Linear(6, VOCABULARY, bias=False, dtype=torch.float64)
    torch.nn.init.normal_(head.weight, generator=chance)
    family = replace(
        Family(), logits_divisor=divisor and "divisor", logits_softcap=softcap and "softcap"
    )
    numbers = type("Numbers", (), {"divisor": divisor, "softcap": softcap})
    loss = segment_loss(hidden, targets, sparse_pass, head, family, numbers, items)
    loss.backward()
    found, hidden.grad = (hidden.grad, head.weight.grad), None
    head.weight.grad = None

    logits = hidden @ head.weight.T / (divisor or 1)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    nll = logits.logsumexp(2) - logits.gather(2, targets.clamp_min(0)[..., None])[..., 0]
    total, labels = 0.0 * nll.sum(), 0
    for row, real in enumerate(batch.real):
        places = [t for t in range(shape[1]) if real[t] and targets[row, t] != -100]
        times = sparse_pass.times_kept[row].tolist()
        mean = sum(times) / max(1, int(real.sum()))
        asked = [t for t in places if supervise == "all" or times[t] >= mean]
        labels += len(places)
        if asked:
            total = total + nll[row, asked].mean() * len(places)
    if items is None:
        count = labels
    else:  # of all labels: those of padding are among them
        count = items * (labels / int((targets != -100).sum()) if labels else 1)
    expected = total / (count or 1)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    for ours, theirs in zip(found, (hidden.grad, head.weight.grad), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-12


@cache
def tiny_model():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = make_model("llama", **sizes, num_hidden_layers=2, num_key_value_heads=1)
    return model.double()


@cases(CASES // 4)
@given(
    batches(48),
    st.builds(
        LeMoConfig,
        retention=st.floats(0.05, 1),
        mlp_retention=st.one_of(st.none(), st.floats(0.05, 1)),
        block_size=st.integers(1, 16),
        policy=st.sampled_from(
            ["auto", "overlap", "chunks", "random", "recent", "pooled", "oracle"]
        ),
        agree_across_layers=st.booleans(),
        supervise=st.sampled_from(["kept", "all"]),
        recompute=st.sampled_from(["none", "mlp", "selective", "lean", "full"]),
        seed=st.integers(0, 2**31),
    ),
)
def test_pass(batch, config):
    model = tiny_model()
    model.zero_grad()
    rest = {"attention_mask": batch.mask, "position_ids": batch.positions}
    rest = {name: x for name, x in rest.items() if x is not None}
    apply_lemo(model, config)
    try:
        with recorded_sets(pytest.MonkeyPatch()) as chosen:
            loss = model(input_ids=batch.ids, labels=batch.labels, **rest).loss
            loss.backward()
    finally:
        remove_lemo(model)
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    attention = [kept for name, kept in chosen if name == "attention"]
    mlp = [kept for name, kept in chosen if name == "mlp"] or attention
    times = sum(kept.int() for _, kept in chosen)
    if config.agree_across_layers:  # one set of each name, counted once
        times = attention[0].int() + (0 if mlp is attention else mlp[0].int())
    asked = batch.real
    if config.supervise == "kept":
        asked = asked & (times >= times.sum(1, keepdim=True) / batch.real.sum(1, keepdim=True))
    sets = list(zip(attention, mlp, strict=True))
    with masked_dense(list(model.model.layers), sets, "mlp"):
        logits = model(input_ids=batch.ids, use_cache=False, **rest).logits
        expected = expected_loss(logits, batch.labels, asked, batch.real)
        expected.backward()
    # Transformers' own norms and softmax are fp32 at any dtype.
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-9)
    for name, parameter in model.named_parameters():
        ours = torch.zeros_like(parameter) if found[name] is None else found[name]
        assert (ours - parameter.grad).norm() <= 2e-5 * parameter.grad.norm() + 1e-7, name
