"""Block scores, streamed, against the whole ``[T, T]`` matrix in fp64."""

import pytest
import torch
from parity import DTYPES, assert_as_good, materialised_scores

from lemo_hf.kernels import block_scores as module
from lemo_hf.kernels.block_scores import block_scores, block_scores_reference


def masks(batch, tokens):
    """Padding and documents: neither, one, the other, both."""
    places = torch.arange(tokens)[None]
    valid = places >= torch.tensor([0, 2, 4])[:batch, None]
    documents = (places // torch.tensor([50, 11, 3])[:batch, None]).long()
    return (None, None), (valid, None), (None, documents), (valid, documents)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize(("tokens", "size"), [(37, 8), (32, 16), (5, 8), (20, 1)])
@pytest.mark.parametrize("buffer", [1, 6000, 2**25])
def test_the_reference_streams_the_definition(
    tokens, size, softcap, window, normalize, buffer, monkeypatch
):
    monkeypatch.setattr(module, "BUFFER", buffer)
    query, key = torch.randn(3, 6, tokens, 8), torch.randn(3, 2, tokens, 8)
    for valid, documents in masks(3, tokens):
        options = dict(window=window, softcap=softcap, normalize=normalize)
        got = block_scores_reference(
            query, key, size, 0.3, valid=valid, documents=documents, **options
        )
        truth = materialised_scores(query, key, size, 0.3, valid, documents, **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "tokens", "dim", "size"),
    [
        (1, 2, 1, 300, 64, 64),
        (3, 4, 2, 200, 80, 16),
        (1, 2, 2, 300, 256, 128),
        (1, 2, 1, 600, 64, 512),
        (1, 3, 3, 250, 96, 100),
        (1, 2, 1, 150, 64, 1),
        (1, 1, 1, 1, 64, 64),
        (1, 1, 1, 40, 16, 7),
    ],
)
def test_the_kernel(batch, heads, kv_heads, tokens, dim, size, dtype, kernels_on):
    query = torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)  # as projections are
    key = torch.randn(batch, kv_heads, tokens, dim).to(dtype)
    for number, (valid, documents) in enumerate(masks(batch, tokens)):
        if dtype != torch.float32 and number not in (0, 3):
            continue
        options = dict(
            valid=valid,
            documents=documents,
            window=(None, 90, None, 33)[number],
            softcap=(None, None, 0.7, None)[number],
            normalize=number % 2 == 1,
        )
        options = {k: v.to(kernels_on) if torch.is_tensor(v) else v for k, v in options.items()}
        inputs = query.to(kernels_on), key.to(kernels_on), size, 0.11
        got = block_scores(*inputs, **options)
        truth = materialised_scores(*inputs, **options)
        same = materialised_scores(*inputs, **options, dtype=torch.float32)
        assert_as_good(got, truth, same)


def test_chunks_of_the_kernel_add_up(kernels_on, monkeypatch):
    query, key = (torch.randn(1, 1, 700, 16, device=kernels_on) for _ in range(2))
    expected = block_scores_reference(query, key, 32, 0.25)
    for chunks in (1, 3, 64):
        monkeypatch.setattr(module, "CHUNKS", chunks)
        torch.testing.assert_close(block_scores(query, key, 32, 0.25), expected)
