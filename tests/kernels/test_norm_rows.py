"""The norm of some rows of a stream, in their places."""

import pytest
import torch

from lemo_hf.kernels.norm import Norm, norm_reference
from lemo_hf.kernels.norm_rows import norm_rows_


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("trained", [False, True])
def test_rows_and_gradients_are_the_norms(kind, trained):
    weight = torch.randn(16).requires_grad_(trained)
    bias = torch.randn(16).requires_grad_(trained) if kind == "layer" else None
    norm = Norm(kind, weight, bias, 1e-5)
    x, index = torch.randn(2, 9, 16, requires_grad=True), torch.tensor([3, 4, 17])
    cotangent = torch.randn(3, 16)

    wanted = norm_reference(x.flatten(0, 1)[index], norm)
    inputs = [x, *([weight] if trained else []), *([bias] if trained and bias is not None else [])]
    expected = torch.autograd.grad((wanted * cotangent).sum(), inputs)

    stream = x * 1
    found = norm_rows_(stream, index, norm)
    assert found.data_ptr() == stream.data_ptr()
    others = torch.ones(18, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(found.flatten(0, 1)[others], x.flatten(0, 1)[others])
    torch.testing.assert_close(found.flatten(0, 1)[index], wanted)
    # As a head does that reads all rows, and of the others no more than nothing.
    loss = (found.flatten(0, 1)[index] * cotangent).sum() + 0 * found.sum()
    for mine, theirs in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
