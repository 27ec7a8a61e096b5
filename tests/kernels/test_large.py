"""On a CUDA GPU: offsets beyond 2**31 elements, and runs that repeat to the bit."""

import pytest
import torch
from torch import nn

from lemo_hf.kernels.gated_activation import gated_activation, gated_activation_reference
from lemo_hf.kernels.gather_norm import add_norm, gather_norm
from lemo_hf.kernels.norm import Norm, norm_reference
from lemo_hf.kernels.rotary import KeptRotary, rotary, rotary_reference
from lemo_hf.kernels.rows import close_stream, open_stream
from lemo_hf.kernels.scatter_add import scatter_add_
from lemo_hf.kernels.segment_cross_entropy import segment_cross_entropy
from lemo_hf.kernels.segment_losses import segment_losses_

pytestmark = pytest.mark.gpu
BF16 = {"dtype": torch.bfloat16, "device": "cuda"}


@pytest.fixture(autouse=True)
def _free():
    yield
    torch.cuda.empty_cache()


def test_streams_beyond_two_to_the_31_elements():
    tokens, width = 600_000, 4096
    x = torch.zeros(1, tokens, width, **BF16).requires_grad_()
    index = torch.tensor([[0, 1, 524_287, 524_288, tokens - 1]], device="cuda")
    norm = Norm("rms", torch.ones(width, **BF16), None, 1e-5)
    stream, rows, hidden = gather_norm(open_stream(x), index, norm)
    rows, _ = add_norm(rows + 2, hidden, norm)
    out = close_stream(scatter_add_(stream, rows, rows, index))
    assert out[0, index[0]].eq(4).all() and out.sum(dtype=torch.float32) == 4 * 5 * width
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    # 2 from the rows, and 2 / sqrt(eps) through the norm of rows that are 0.
    torch.testing.assert_close(
        gradient[0, index[0]].float(),
        torch.full((5, width), 2 + 2 * 1e-5**-0.5, device="cuda"),
        rtol=1e-2,
        atol=0,
    )
    assert gradient[0, 524_289].eq(1).all()


def test_many_rows_beyond_two_to_the_31_elements():
    rows, width = 530_000, 4096
    x = torch.zeros(1, rows, width, **BF16)
    x[:, -3:].normal_()
    norm = Norm("layer", torch.rand(width, **BF16), torch.rand(width, **BF16), 1e-5)
    total, hidden = add_norm(x, x, norm)
    torch.testing.assert_close(total[:, -3:], 2 * x[:, -3:])
    torch.testing.assert_close(hidden[:, -3:], norm_reference(total[:, -3:], norm))


def test_gates_beyond_two_to_the_31_elements():
    gate = torch.zeros(160_000, 14336, **BF16)
    gate[-2:].normal_()
    gate.requires_grad_()
    up = torch.ones_like(gate)
    out = gated_activation(gate, up, "silu")
    (grad,) = torch.autograd.grad(out, gate, torch.ones_like(out))
    leaf = gate[-2:].detach().requires_grad_()
    expected = gated_activation_reference(leaf, up[-2:], "silu")
    torch.testing.assert_close(out[-2:], expected)
    (expected,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(grad[-2:], expected)


def test_rotary_beyond_two_to_the_31_elements():
    kept, heads, dim = 600_000, 32, 128
    x = torch.zeros(1, kept, heads, dim, **BF16).transpose(1, 2)
    x[:, :, -4:].normal_()
    index = torch.arange(kept, device="cuda")[None]
    table = torch.rand(1, kept, dim, **BF16)
    tables = KeptRotary(table, index), KeptRotary(table, index)
    out, key = rotary(x, x[:, :2], *tables)
    last = KeptRotary(table, index[:, -4:])
    torch.testing.assert_close(out[:, :, -4:], rotary_reference(x[:, :, -4:], last, last))
    torch.testing.assert_close(key, out[:, :2])


def test_segments_beyond_two_to_the_31_logits():
    rows, vocabulary = 17_000, 128_256
    logits = torch.zeros(rows, vocabulary, **BF16)
    logits[-2:].normal_()
    expected = logits[-2:].clone()
    targets = torch.arange(rows, device="cuda")
    weights = torch.ones(rows, device="cuda")
    losses = torch.empty(rows, device="cuda")
    segment_losses_(logits, targets, weights, losses)
    segment_losses_(expected, targets[-2:], weights[-2:], losses[:2])
    assert torch.equal(losses[:2], losses[-2:])
    assert torch.equal(logits[-2:], expected)


def test_two_runs_are_bit_equal():
    torch.manual_seed(0)
    x = torch.randn(2, 4096, 1024, **BF16).requires_grad_()
    index = torch.stack([torch.randperm(4096, device="cuda")[:2048].sort().values] * 2)
    norm = Norm("rms", torch.rand(1024, **BF16).requires_grad_(), None, 1e-5)
    head = nn.Linear(1024, 5000, bias=False, **BF16)
    table = torch.rand(1, 4096, 64, **BF16)
    targets = torch.randint(0, 5000, (8192,), device="cuda")

    def run():
        stream, rows, hidden = gather_norm(open_stream(x), index, norm)
        heads = hidden.unflatten(2, (-1, 64)).transpose(1, 2)
        tables = KeptRotary(table, index), KeptRotary(table, index)
        heads, _ = rotary(heads, heads[:, :4], *tables)
        update = heads.transpose(1, 2).flatten(2)
        rows, hidden = add_norm(rows, update, norm)
        update = gated_activation(hidden, update, "silu")
        out = close_stream(scatter_add_(stream, rows, update, index)).flatten(0, 1)
        loss = segment_cross_entropy(
            out, targets, torch.ones(8192, device="cuda"), head, parameters=[head.weight]
        )
        wanted = (x, norm.weight, head.weight)
        return loss, *torch.autograd.grad(loss, wanted)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
        assert first.isfinite().all()
