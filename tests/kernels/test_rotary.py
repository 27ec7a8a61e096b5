"""Rotary positions of kept tokens, against transformers' own function and fp64."""

import pytest
import torch
from support.grids import covering
from support.parity import DTYPES, assert_as_good, keep_index
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from lemo_hf.kernels.rotary import KeptRotary, rotary, rotary_reference


def tables(batch, tokens, width, dtype, device):
    """cos and sin whose halves differ, so that no half may stand for the other."""
    return (torch.randn(batch, tokens, width).to(device, dtype) for _ in range(2))


def both(query, key, cos, sin):
    return rotary_reference(query, cos, sin), rotary_reference(key, cos, sin)


# Batch, heads, key heads, tokens, kept tokens, size of a head, width of the tables.
SHAPES = [
    (1, 1, 1, 5, 5, 8, 8),
    (3, 5, 2, 9, 4, 12, 12),
    (2, 4, 4, 6, 1, 16, 6),
    (2, 2, 1, 6, 0, 8, 8),
    (2, 3, 1, 7, 3, 80, 48),
]


@pytest.mark.parametrize(
    ("dtype", "shape", "shared_table", "projected"),
    covering(DTYPES, SHAPES, [True, False], [True, False]),
)
def test_rotary(shape, shared_table, projected, dtype, device):
    batch, heads, key_heads, tokens, kept, dim, width = shape
    inputs, grads = [], []
    for count in (heads, key_heads):
        x = torch.randn(batch, kept, count, dim).to(device, dtype).transpose(1, 2)
        inputs.append(x if projected else x.contiguous())
        grads.append(torch.randn(batch, count, kept, dim).to(device, dtype))
    index = keep_index(batch, tokens, kept).to(device)
    cos, sin = tables(1 if shared_table else batch, tokens, width, dtype, device)

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, *(KeptRotary(part.to(dtype), index) for part in (cos, sin)))
        return *out, *torch.autograd.grad(out, leaves, [grad.to(dtype) for grad in grads])

    for values in zip(run(rotary, dtype), run(both, torch.float64), run(both, dtype), strict=True):
        assert_as_good(*values)


def test_the_definition_is_that_of_transformers():
    x = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    index = keep_index(2, 11, 7)
    cos, sin = (
        KeptRotary(part, index) for part in tables(2, 11, 12, torch.float64, torch.device("cpu"))
    )
    expected, _ = apply_rotary_pos_emb(x, x, cos.gathered, sin.gathered)
    torch.testing.assert_close(rotary_reference(x, cos, sin), expected)


def test_inputs_may_change_after_the_call(device):
    x = torch.randn(1, 2, 4, 8, device=device, requires_grad=True)
    index = torch.arange(4, device=device)[None]
    cos, sin = (KeptRotary(t, index) for t in tables(1, 4, 8, torch.float32, device))
    (expected,) = torch.autograd.grad(rotary_reference(x, cos, sin).sum(), x)
    out, _ = rotary(x, x.detach(), cos, sin)
    with torch.no_grad():
        x.fill_(float("nan"))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], expected)
