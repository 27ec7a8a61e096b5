"""Kept rows, block scores and the segment loss against their definitions in fp64."""

import pytest
import torch

from lemo_hf.kernels import block_scores
from lemo_hf.kernels.block_scores import block_scores_reference
from lemo_hf.kernels.rows import close_stream, open_stream, update_rows
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX, segment_cross_entropy


def ulp_bound(actual, truth, same_dtype):
    """The house rule: no further from the truth than twice a plain reference, plus one ulp."""
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - truth).abs().max()
    allowed = 2 * (same_dtype.double() - truth).abs().max() + eps * truth.abs().max()
    assert error <= allowed, (error, allowed)


def keep_index(batch, tokens, kept):
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)])
    return order[:, :kept].sort(1).values


@pytest.mark.parametrize("shape", [(1, 7, 3), (3, 33, 5), (2, 64, 16)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("idle", [False, True])
def test_update_rows_is_index_add(shape, share, idle):
    batch, tokens, hidden = shape
    kept = round(share * tokens)
    index = keep_index(batch, tokens, kept)
    slots = torch.rand(batch, kept) < 0.6 if idle else None
    weight = torch.randn(hidden, hidden, dtype=torch.float64, requires_grad=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out_grad = torch.randn(shape, dtype=torch.float64)

    stream = open_stream(x)
    for _ in range(2):
        stream = update_rows(stream, index, lambda rows: rows + torch.tanh(rows @ weight), slots)
    result = close_stream(stream)
    gradients = torch.autograd.grad(result, (x, weight), out_grad)

    dense = x
    keep = torch.zeros(batch, tokens, dtype=torch.bool)
    keep.scatter_(1, index, torch.ones_like(index, dtype=torch.bool) if slots is None else slots)
    for _ in range(2):
        dense = dense + torch.tanh(dense @ weight) * keep[..., None]
    expected = torch.autograd.grad(dense, (x, weight), out_grad)
    torch.testing.assert_close(result, dense)
    torch.testing.assert_close(gradients, expected)


def test_update_rows_changes_the_stream_in_place_and_nothing_else():
    x = torch.randn(2, 10, 4)
    stream = open_stream(x)
    index = torch.tensor([[1, 5], [0, 9]])
    out = update_rows(stream, index, lambda rows: rows + 1)
    assert out.data_ptr() == stream.data_ptr() != x.data_ptr()
    expected = x.clone()
    expected[0, [1, 5]] += 1
    expected[1, [0, 9]] += 1
    assert torch.equal(out, expected)


def test_update_rows_keeps_what_its_function_saved():
    """The stream changes after the rows were read; their gradient is still that of what ran."""
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 3]])
    stream = update_rows(open_stream(x), index, lambda rows: rows * rows)
    stream = update_rows(stream, index, lambda rows: rows * 3)
    (gradient,) = torch.autograd.grad(close_stream(stream).sum(), x)
    expected = torch.ones_like(x)
    expected[0, [0, 3]] = 6 * x[0, [0, 3]].detach()
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("x", "index", "message"),
    [
        (torch.zeros(2, 4, 3).transpose(0, 1), torch.zeros(4, 1).long(), "contiguous"),
        (torch.zeros(2, 4, 3), torch.zeros(1, 2).long(), r"B = 2, got \(1, 2\)"),
        (torch.zeros(2, 4, 3), torch.zeros(2).long(), r"\[B, K\]"),
    ],
)
def test_update_rows_refuses(x, index, message):
    with pytest.raises(ValueError, match=message):
        update_rows(x, index, lambda rows: rows)


def materialised_scores(query, key, size, scaling, valid, documents, window, softcap, normalize):
    """The paper's definition with the whole ``[T, T]`` matrix, fp64."""
    tokens = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ key.double().mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    visible = (j <= i)[None].expand(len(query), -1, -1)
    if window is not None:
        visible = visible & (i - j < window)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None])
    if valid is not None:
        visible = visible & valid[:, :, None] & valid[:, None]
    scores = scores.clamp_min(0).mean(1) * visible
    padding = -tokens % size
    pad = (0, padding, 0, padding)
    blocks = torch.nn.functional.pad(scores, pad).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    seen = torch.nn.functional.pad(visible, pad).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    total = blocks.amax((2, 4)).sum(1)
    return total / seen.any(4).any(2).sum(1).clamp_min(1) if normalize else total


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize(("tokens", "size"), [(37, 8), (32, 16), (5, 8), (20, 1)])
@pytest.mark.parametrize("buffer", [1, 6000, 2**25])
def test_block_scores_stream_the_definition(
    tokens, size, softcap, window, normalize, buffer, monkeypatch
):
    monkeypatch.setattr(block_scores, "BUFFER", buffer)
    query, key = torch.randn(3, 6, tokens, 8), torch.randn(3, 2, tokens, 8)
    valid = torch.arange(tokens)[None] >= torch.tensor([0, 2, 4])[:, None]
    documents = (torch.arange(tokens)[None] // torch.tensor([50, 11, 3])[:, None]).long()
    for mask, docs in ((None, None), (valid, None), (None, documents), (valid, documents)):
        options = dict(window=window, softcap=softcap, normalize=normalize)
        got = block_scores_reference(query, key, size, 0.3, valid=mask, documents=docs, **options)
        truth = materialised_scores(query, key, size, 0.3, mask, docs, **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("segment_size", [1, 7, 100])
@pytest.mark.parametrize(("divisor", "softcap"), [(1.0, None), (2.5, None), (1.0, 3.0), (2.0, 4.0)])
def test_segment_cross_entropy(dtype, segment_size, divisor, softcap):
    rows, hidden_size, vocabulary = 23, 6, 31
    base = torch.randn(rows, hidden_size).to(dtype)
    matrix = torch.randn(vocabulary, hidden_size).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[torch.rand(rows) < 0.4] = IGNORE_INDEX
    weights = torch.rand(rows) + 0.5

    def plain(dtype):
        hidden = base.to(dtype).detach().requires_grad_()
        weight = matrix.to(dtype).detach().requires_grad_()
        logits = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32)) / divisor
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        nll = torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=IGNORE_INDEX, reduction="none"
        )
        loss = (nll * weights).sum() / 7
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    hidden = base.detach().requires_grad_()
    weight = matrix.detach().requires_grad_()
    loss = segment_cross_entropy(
        hidden,
        targets,
        weights,
        lambda rows: rows @ weight.T,
        segment_size=segment_size,
        divisor=divisor,
        softcap=softcap,
        parameters=[weight],
    )
    gradients = torch.autograd.grad(loss / 7, (hidden, weight))
    for actual, truth, same in zip(
        (loss / 7, *gradients), plain(torch.float64), plain(dtype), strict=True
    ):
        ulp_bound(actual, truth, same)
    assert (gradients[0][targets == IGNORE_INDEX] == 0).all()


def test_segment_cross_entropy_never_makes_all_logits():
    seen = []

    def head(rows):
        seen.append(len(rows))
        return rows @ torch.ones(4, 9)

    targets = torch.tensor([1, IGNORE_INDEX, 2, 3, IGNORE_INDEX, 4, 5])
    hidden = torch.randn(7, 4, requires_grad=True)
    segment_cross_entropy(hidden, targets, torch.ones(7), head, segment_size=2).backward()
    assert seen == [2, 2, 1]


def test_segment_cross_entropy_without_labels_is_zero_and_differentiable():
    hidden = torch.randn(3, 4, requires_grad=True)
    targets = torch.full((3,), IGNORE_INDEX)
    loss = segment_cross_entropy(hidden, targets, torch.ones(3), lambda rows: rows, segment_size=2)
    loss.backward()
    assert loss.item() == 0 and (hidden.grad == 0).all()


def test_segment_cross_entropy_has_one_backward():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = segment_cross_entropy(
        hidden, torch.zeros(3).long(), torch.ones(3), lambda rows: rows, segment_size=2
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
