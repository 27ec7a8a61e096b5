"""FP8 rows and products of them: by the kernels, by the definition, and in exact numbers."""

import pytest
import torch

from lemo_hf.kernels.fp8 import FP8, LARGEST, quantize_rows, scaled_product, transposed
from lemo_hf.kernels.launch import use_triton

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def matrix(rows, width, device, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]  # rows of all sizes
    return x.to(device, dtype)


@pytest.mark.parametrize("width", [16, 48, 1040])
@pytest.mark.parametrize("by_columns", [False, True])
def test_rows_are_as_close_as_fp8_allows(device, width, by_columns):
    x = matrix(21, width, device)
    x[3] = 0
    columns = torch.linspace(0.1, 5, width, device=device) if by_columns else None
    values, scales = quantize_rows(x, columns)
    assert values.dtype == FP8 and values.shape == x.shape and scales.shape == (21, 1)
    exact = x.double() if columns is None else x.double() * columns.double()
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(
        scales.double() * LARGEST, largest.clamp(min=1e-12), rtol=1e-5, atol=0
    )
    error = (values.double() * scales.double() - exact).abs()
    # Half a unit of 3 bits of mantissa, or of the smallest number above 0.
    close = error <= (exact.abs() * 2**-4 + scales.double() * 2**-10) * 1.01
    if (
        use_triton(x) and not GPU
    ):  # its interpreter loses the carry of a mantissa that is rounded up
        rounded = (exact / scales.double()).to(FP8).double().abs()
        close |= rounded.log2().frac() == 0
    assert close.all()


def test_rows_need_not_lie_close(device):
    x = matrix(8, 64, device)
    for part in (x[:, 16:48], x.mT):  # rows apart from each other, and columns that are rows
        values, scales = quantize_rows(part)
        again, same = quantize_rows(part.contiguous())
        assert torch.equal(values.view(torch.uint8), again.view(torch.uint8))
        assert torch.equal(scales, same)


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [16, 1040])
def test_what_is_not_finite_stays_so(device, lost, width):
    x = matrix(16, width, device)
    x[2, 5] = x[9] = lost
    values, scales = quantize_rows(x)
    finite = scales.isfinite()[:, 0]
    assert not finite[[2, 9]].any() and finite.sum() == 14
    # A product of FP8 with such a scale is not finite, whatever the FP8 value.
    dtype = torch.bfloat16 if x.is_cuda else torch.float32
    product = scaled_product((values, scales), quantize_rows(matrix(32, width, device)), dtype)
    assert torch.equal(product.isfinite().all(1), finite)
    assert torch.equal(product.isfinite().any(1), finite)


@pytest.mark.parametrize("shape", [(16, 16), (80, 48), (64, 208)])
def test_transposition(device, shape):
    values, _ = quantize_rows(matrix(*shape, device))
    found = transposed(values)
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8).mT)


def test_product_is_that_of_what_was_stored():
    device = "cuda" if GPU else "cpu"
    dtype = torch.bfloat16 if GPU else torch.float32
    x, y = (quantize_rows(matrix(n, 64, device, dtype, n)) for n in (32, 48))
    exact = (x[0].double() * x[1].double()) @ (y[0].double() * y[1].double()).mT
    found = scaled_product(x, y, dtype).double()
    assert ((found - exact).norm() / exact.norm()) < (4e-3 if GPU else 1e-6)
