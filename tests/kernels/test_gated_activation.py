"""SwiGLU and GEGLU against fp64, and what they save."""

import pytest
import torch
from support.grids import covering
from support.parity import DTYPES, assert_as_good
from torch.autograd.graph import saved_tensors_hooks

from lemo_hf.kernels.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_reference,
)

SHAPES = [(1, 1, 3), (3, 5, 7), (2, 3, 17000), (2, 0, 8), (4, 33)]


@pytest.mark.parametrize(
    ("dtype", "activation", "shape", "fused"), covering(DTYPES, ACTIVATIONS, SHAPES, [False, True])
)
def test_gated_activation(shape, activation, dtype, fused, device):
    both = (2 * torch.randn(*shape[:-1], 2 * shape[-1])).to(device, dtype)
    grad = torch.randn(shape).to(device, dtype)

    def run(function, dtype):
        leaf = both.detach().to(dtype).requires_grad_()
        parts = leaf.chunk(2, -1)
        parts = parts if fused else [part.contiguous() for part in parts]
        out = function(*parts, activation)
        return out, *torch.autograd.grad(out, leaf, grad.to(dtype))

    for values in zip(
        run(gated_activation, dtype),
        run(gated_activation_reference, torch.float64),
        run(gated_activation_reference, dtype),
        strict=True,
    ):
        assert_as_good(*values)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates_stay_finite(activation, device):
    gate = torch.tensor([[-1e4, -90.0, -0.0, 0.0, 90.0, 1e4]], device=device, requires_grad=True)
    out = gated_activation(gate, torch.ones_like(gate), activation)
    (grad,) = torch.autograd.grad(out.sum(), gate)
    torch.testing.assert_close(out[0, [0, 1, 4, 5]].cpu(), torch.tensor([0.0, 0.0, 90.0, 1e4]))
    torch.testing.assert_close(grad[0, [0, 1, 4, 5]].cpu(), torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_nothing_but_gate_and_up_is_saved(kernels_on):
    saved = []
    gate, up = (torch.randn(2, 3, 8, device=kernels_on, requires_grad=True) for _ in range(2))
    with saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        gated_activation(gate, up, "silu")
    assert sorted(saved) == sorted([gate.data_ptr(), up.data_ptr()])
