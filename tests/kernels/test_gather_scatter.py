"""Reading, normalising and storing kept rows: against the definition in fp64, and in place."""

import pytest
import torch
from support.grids import covering
from support.parity import DTYPES, assert_as_good, keep_index

from lemo_hf.kernels.gather_norm import add_norm, gather_norm
from lemo_hf.kernels.norm import KINDS, Norm, norm_reference
from lemo_hf.kernels.rows import close_stream, gather_rows, open_stream
from lemo_hf.kernels.scatter_add import scatter_add_, scatter_add_reference

SHAPES = [(1, 7, 3), (3, 13, 5), (2, 16, 64), (1, 9, 40)]


def make_norm(kind, width, dtype, device, trains=True):
    weight = (torch.rand(width) + 0.5).to(dtype)
    bias = torch.randn(width).to(dtype) if kind == "layer" else None
    weight, bias = (
        None if part is None else part.to(device).requires_grad_(trains) for part in (weight, bias)
    )
    return Norm(kind, weight, bias, 1e-5)


def in_dtype(norm, dtype):
    parts = (None if p is None else p.detach().to(dtype).requires_grad_() for p in norm[1:3])
    return Norm(norm.kind, *parts, norm.eps)


def cases(dtype, shape, share, device):
    """Stream, index, and a slot mask where half of the rows are kept."""
    batch, tokens, _ = shape
    index = keep_index(batch, tokens, round(share * tokens)).to(device)
    slots = torch.rand(index.shape, device=device) < 0.6 if share == 0.5 else None
    return torch.randn(shape).to(device, dtype), index, slots


def random_like(*tensors):
    return [torch.randn(t.shape).to(t.device, t.dtype) for t in tensors]


def compare(actual, reference, inputs, norm, dtype):
    """``actual`` are outputs and gradients; ``reference(inputs, norm)`` gives them in any dtype."""
    for values in zip(
        actual,
        reference([i.double() for i in inputs], in_dtype(norm, torch.float64)),
        reference(inputs, in_dtype(norm, dtype)),
        strict=True,
    ):
        assert_as_good(*values)


def learnt(norm):
    return [part for part in norm[1:3] if part is not None]


SHARES = [0.0, 0.1, 0.5, 1.0]


@pytest.mark.parametrize(
    ("dtype", "kind", "shape", "share"), covering(DTYPES, KINDS, SHAPES, SHARES)
)
def test_gather_norm(shape, share, kind, dtype, device):
    x, index, slots = cases(dtype, shape, share, device)
    norm = make_norm(kind, shape[2], dtype, device)
    leaf = x.detach().requires_grad_()
    stream, rows, hidden = gather_norm(open_stream(leaf), index, norm, slots)
    gx, grows, ghidden = grads = random_like(x, rows, hidden)
    got = torch.autograd.grad(
        (close_stream(stream), rows, hidden), [leaf, *learnt(norm)], grads, retain_graph=True
    )
    kept = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    kept.scatter_(1, index, torch.ones_like(index, dtype=torch.bool) if slots is None else slots)

    def reference(inputs, norm):
        x, gx, grows, ghidden = inputs
        x = x.detach().requires_grad_()
        rows = gather_rows(x, index)
        hidden = norm_reference(rows, norm)
        idle = 1 if slots is None else slots[..., None]
        (grad_x,) = torch.autograd.grad(
            (rows, hidden), x, (grows * idle, ghidden * idle), retain_graph=True
        )
        grad_x = torch.where(kept[..., None], grad_x, gx)
        return rows, hidden, grad_x, *torch.autograd.grad(hidden, learnt(norm), ghidden)

    compare((rows, hidden, *got), reference, (x, gx, grows, ghidden), norm, dtype)


@pytest.mark.parametrize(
    ("dtype", "kind", "shape", "scale", "kept"),
    covering(DTYPES, KINDS, SHAPES, [1.0, 0.3], [0, 1, 6]),
)
def test_add_norm(shape, scale, kept, kind, dtype, device):
    rows, update = (torch.randn(shape[0], kept, shape[2]).to(device, dtype) for _ in range(2))
    norm = make_norm(kind, shape[2], dtype, device)
    leaves = [part.detach().requires_grad_() for part in (rows, update)]
    total, hidden = add_norm(*leaves, norm, scale)
    stored = total.detach()
    grads = random_like(total, hidden)
    got = torch.autograd.grad((total, hidden), [*leaves, *learnt(norm)], grads)

    def reference(inputs, norm):
        *leaves, gtotal, ghidden = inputs
        leaves = [part.detach().requires_grad_() for part in leaves]
        total = leaves[0] + scale * leaves[1]
        # The norm is that of the sum as it was stored. (The interpreter cuts bf16, rounding not.)
        hidden = norm_reference(total + (stored.to(total.dtype) - total).detach(), norm)
        return (
            total,
            hidden,
            *torch.autograd.grad((total, hidden), [*leaves, *learnt(norm)], (gtotal, ghidden)),
        )

    compare((total, hidden, *got), reference, (rows, update, *grads), norm, dtype)


@pytest.mark.parametrize(
    ("dtype", "shape", "share", "scale"), covering(DTYPES, SHAPES, SHARES, [None, 1.0, 0.3])
)
def test_scatter_add(shape, share, scale, dtype, device):
    x, index, slots = cases(dtype, shape, share, device)
    rows, update = (torch.randn(*index.shape, shape[2]).to(device, dtype) for _ in range(2))
    (grad,) = random_like(x)

    def run(function, dtype):
        leaves = [part.detach().to(dtype).requires_grad_() for part in (x, rows, update)]
        extra = leaves[2] if scale is not None else None
        out = function(*leaves[:2], extra, scale or 1.0)
        return out, *torch.autograd.grad(out, leaves[1 : 2 if scale is None else 3], grad.to(dtype))

    def reference(x, rows, update, scale):
        return scatter_add_reference(x, rows, update, index, slots, scale)

    def kernel(x, rows, update, scale):
        return close_stream(scatter_add_(open_stream(x), rows, update, index, slots, scale))

    for values in zip(
        run(kernel, dtype), run(reference, torch.float64), run(reference, dtype), strict=True
    ):
        assert_as_good(*values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_norm_and_rows_without_an_update(kind, kernels_on):
    norm = make_norm(kind, 12, torch.float32, kernels_on, trains=False)
    rows = torch.randn(2, 5, 12, device=kernels_on, requires_grad=True)
    straight, hidden = add_norm(rows, None, norm)
    loss = (straight * 2 + torch.sin(hidden)).sum()
    (actual,) = torch.autograd.grad(loss, rows)
    expected = rows * 2 + torch.sin(norm_reference(rows, norm))
    torch.testing.assert_close(straight, rows)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), rows)[0])


def test_a_llama_norm_with_an_fp32_weight_widens(device):
    """As transformers does; a Gemma norm keeps the dtype of its input."""
    rows = torch.randn(1, 3, 8, dtype=torch.bfloat16, device=device)
    for kind, dtype in (("rms", torch.float32), ("rms_plus_one", torch.bfloat16)):
        norm = make_norm(kind, 8, torch.float32, device)
        assert add_norm(rows, None, norm)[1].dtype == dtype


def test_the_stream_changes_in_place_and_nowhere_else(device):
    x = torch.randn(2, 10, 4, device=device)
    stream = open_stream(x)
    index = torch.tensor([[1, 5], [0, 9]], device=device)
    again, rows, hidden = gather_norm(stream, index, None)
    out = scatter_add_(again, rows, torch.ones_like(rows), index)
    assert hidden is None
    assert out.data_ptr() == again.data_ptr() == stream.data_ptr() != x.data_ptr()
    expected = x.clone()
    expected[0, [1, 5]] += 1
    expected[1, [0, 9]] += 1
    assert torch.equal(out, expected)


def test_gradients_are_those_of_what_ran(device):
    """The stream changes after the rows were read; the norm's gradient is of what it saw."""
    x = torch.randn(1, 6, 4, dtype=torch.float32, device=device, requires_grad=True)
    norm = make_norm("rms", 4, torch.float32, device)
    index = torch.tensor([[0, 3]], device=device)
    stream = open_stream(x)
    for factor in (1.0, 5.0):
        stream, rows, hidden = gather_norm(stream, index, norm)
        stream = scatter_add_(stream, rows, hidden * factor, index)
    (actual,) = torch.autograd.grad(close_stream(stream).square().sum(), x)
    dense = x
    for factor in (1.0, 5.0):
        rows = gather_rows(dense, index)
        dense = scatter_add_reference(dense, rows, norm_reference(rows, norm) * factor, index)
    torch.testing.assert_close(actual, torch.autograd.grad(dense.square().sum(), x)[0])


@pytest.mark.parametrize(
    ("x", "index", "message"),
    [
        (torch.zeros(2, 4, 3).transpose(0, 1), torch.zeros(4, 1).long(), "contiguous"),
        (torch.zeros(2, 4, 3), torch.zeros(1, 2).long(), r"B = 2, got \(1, 2\)"),
        (torch.zeros(2, 4, 3), torch.zeros(2).long(), r"\[B, K\]"),
    ],
)
def test_what_is_no_stream_is_refused(x, index, message):
    with pytest.raises(ValueError, match=message):
        gather_norm(x, index, None)
    with pytest.raises(ValueError, match=message):
        scatter_add_(x, torch.zeros(1), None, index)


def test_rows_too_wide_for_a_program_are_refused(kernels_on):
    with pytest.raises(ValueError, match="65537 elements"):
        gather_norm(
            torch.zeros(1, 1, 65537, device=kernels_on),
            torch.zeros(1, 1, dtype=torch.long, device=kernels_on),
            None,
        )
