"""Predicted block scores against fp64, against the network that is trained, and as a policy."""

import copy
from functools import partial

import pytest
import torch
from models import make_model
from parity import DTYPES, assert_as_good

from lemo_hf import LeMoConfig, policies
from lemo_hf.families import family_of
from lemo_hf.kernels import predict_blocks as module
from lemo_hf.kernels.norm import Norm, norm_reference
from lemo_hf.kernels.predict_blocks import predict_blocks, predict_blocks_reference
from lemo_hf.policies import ScoreInputs
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.step import Step

HEADS = {
    "sum": {},
    "mean": {"normalize": True},
    "causal": {"normalize": True, "causal": True},
    "mlp": {"head": "mlp", "rank": 1},
    "causal mlp": {"head": "mlp", "rank": 1, "causal": True},
}


def network(width, size, dtype=torch.float32, **options) -> BlockPredictor:
    options = {"units": 20, "rank": 3, "longest": 16, **options}
    predictor = BlockPredictor(width, size, **options)
    generator = torch.Generator().manual_seed(0)
    predictor.init_weights(generator)
    for name, parameter in predictor.named_parameters():
        if parameter.dim() == 1 and "." not in name:
            torch.nn.init.normal_(parameter, generator=generator)
    torch.nn.init.normal_(predictor.embed.bias, std=0.3, generator=generator)
    return predictor.to(dtype).requires_grad_(False)


def a_norm(kind, width, dtype) -> Norm | None:
    if kind is None:
        return None
    weight, bias = torch.randn(2, width).mul_(0.3).to(dtype)
    weight = weight if kind == "rms_plus_one" else weight + 1
    return Norm(kind, weight, bias if kind == "layer" else None, 1e-5)


def masks(batch, tokens, size):
    """Padding and documents: neither, one, the other, both."""
    places = torch.arange(tokens)[None]
    valid = places >= torch.tensor([0, tokens // 3 + 1, 2])[:batch, None]
    blocks = torch.arange(-(-tokens // size))[None]
    documents = blocks // torch.tensor([3, 1, 2])[:batch, None]
    return (None, None), (valid, None), (None, documents), (valid, documents)


def assert_right(x, norm, net, valid, documents):
    """As good as the network's own way with both factors of the product with ``x`` in its dtype.

    Returns:
        The scores, -inf where there is padding alone.
    """
    options = {"valid": valid, "documents": documents}
    run = partial(
        predict_blocks,
        block_size=net.block_size,
        longest=net.longest,
        normalize=net.normalize,
    )
    got = run(x, norm, dict(net.named_parameters()), **options)
    wide = {name: parameter.double() for name, parameter in net.named_parameters()}
    precise = norm and moved(norm, dtype=torch.float64)
    truth = run(x.double(), precise, wide, **options)
    rounded = copy.deepcopy(net)
    rounded.embed.weight.copy_(net.embed.weight.to(x.dtype))
    same = rounded(x if norm is None else norm_reference(x, norm), **options)
    assert got.dtype == torch.float32 and torch.equal(got.isneginf(), truth.isneginf())
    real = ~truth.isneginf()
    assert_as_good(got[real], truth[real], same[real])
    return got


def moved(tensors, **where):
    """The same tuple, its tensors converted."""
    parts = [part.to(**where) if torch.is_tensor(part) else part for part in tensors]
    return type(tensors)(*parts) if isinstance(tensors, Norm) else parts


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("tokens", "size"), [(37, 8), (32, 16), (5, 8), (20, 1), (50, 12)])
def test_the_definition_is_the_network_that_is_trained(tokens, size, head):
    net, x = network(12, size, **HEADS[head]), torch.randn(3, tokens, 12)
    norm = a_norm("rms", 12, torch.float32)
    for valid, documents in masks(3, tokens, size):
        got = predict_blocks_reference(
            x,
            norm,
            dict(net.named_parameters()),
            size,
            longest=16,
            normalize=net.normalize,
            valid=valid,
            documents=documents,
        )
        expected = net(norm_reference(x, norm), valid, documents)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_each_head_with_padding_and_documents(head, dtype, kernels_on):
    net = network(80, 16, **HEADS[head]).to(kernels_on)
    x = (2 * torch.randn(2, 150, 80)).to(kernels_on, dtype)
    norm = moved(a_norm("rms", 80, dtype), device=kernels_on)
    for mask in masks(2, 150, 16):
        assert_right(x, norm, net, *moved(mask, device=kernels_on))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "rms", "rms_plus_one", "layer"])
def test_each_norm(kind, dtype, kernels_on):
    net = network(100, 8, units=33).to(kernels_on)
    x = (torch.randn(2, 70, 100) + 0.5).to(kernels_on, dtype)
    norm = a_norm(kind, 100, dtype)
    norm = norm and moved(norm, device=kernels_on)
    assert_right(x, norm, net, None, None)


@pytest.mark.parametrize(
    ("tokens", "size", "units", "rank"),
    [
        (200, 64, 16, 32),  # blocks fill a tile
        (300, 128, 33, 5),  # a block is a tile, and two of the second kernel
        (270, 100, 20, 3),  # a block is a part of a tile
        (600, 256, 20, 3),  # several tiles
        (150, 1, 20, 3),
        (70, 7, 128, 17),
        (1, 64, 1, 1),
    ],
)
@pytest.mark.parametrize("head", ["mean", "causal", "mlp"])
def test_blocks_and_units_of_any_size(tokens, size, units, rank, head, kernels_on):
    options = {"units": units, "rank": rank, **HEADS[head]}
    net = network(64, size, **options).to(kernels_on)
    x = torch.randn(1, tokens, 64).to(kernels_on)
    norm = Norm("rms", torch.ones(64, device=kernels_on), None, 1e-5)
    for mask in masks(1, tokens, size)[::3]:
        assert_right(x, norm, net, *moved(mask, device=kernels_on))


def test_many_query_blocks(kernels_on):
    """More than are looked at in one go, before and after the key block."""
    x = torch.randn(1, 360, 16).to(kernels_on)
    for head in ("sum", "causal"):
        net = network(16, 2, **HEADS[head]).to(kernels_on)
        assert_right(x, None, net, None, None)


def test_more_than_fits_is_refused():
    net = network(8, 4, units=module.MOST_UNITS + 1)
    with pytest.raises(ValueError, match="at most 128"):
        predict_blocks(torch.randn(1, 8, 8), None, dict(net.named_parameters()), 4, longest=16)


@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "opt"])
def test_the_policy_takes_the_kernel(family, sublayer, kernels_on, monkeypatch):
    """And the network's own way where somebody hangs on a call, or there is a gradient."""
    layer = make_model(family).to(kernels_on).get_submodule(family_of(family).layers)[1]
    x = torch.randn(2, 45, 32, device=kernels_on)
    mask = torch.ones(2, 45, dtype=torch.long, device=kernels_on)
    mask[1, :11] = 0
    config = LeMoConfig(policy="predictor", block_size=8)
    step = Step(config, (2, 45), x.device, attention_mask=mask)
    net = network(32, 8).to(kernels_on)
    inputs = ScoreInputs(layer, family_of(family), 1, sublayer, x, None, step, net)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return predict_blocks(*args, **kwargs)

    monkeypatch.setattr(policies, "predict_blocks", counted)
    with torch.no_grad():
        got = policies.predictor(inputs)
        assert len(calls) == 1
        net.key.register_forward_hook(lambda *_: None)
        expected = policies.predictor(inputs)
    assert torch.equal(policies.predictor(inputs), expected)
    assert len(calls) == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_documents_reach_the_kernel(kernels_on):
    layer = make_model("llama").to(kernels_on).get_submodule("model.layers")[0]
    x = torch.randn(1, 48, 32, device=kernels_on)
    positions = torch.cat([torch.arange(20), torch.arange(28)])[None].to(kernels_on)
    step = Step(
        LeMoConfig(policy="predictor", block_size=8), (1, 48), x.device, position_ids=positions
    )
    net = network(32, 8).to(kernels_on)
    inputs = ScoreInputs(layer, family_of("llama"), 0, "attention", x, None, step, net)
    with torch.no_grad():
        got = policies.predictor(inputs)
    torch.testing.assert_close(got, policies.predictor(inputs), rtol=1e-4, atol=1e-5)


REAL = {"dtype": torch.bfloat16, "device": "cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("units", "head"), [(128, "sum"), (41, "causal"), (64, "mlp")])
def test_at_a_real_size(units, head, weights):
    """As good as the network's own way; and half of the blocks are the same but for rounding."""
    options = {"units": units, "rank": 32, "longest": 1024, **HEADS[head]}
    net = network(4096, 64, dtype=weights, **options).cuda()
    x = torch.randn(1, 16384, 4096, **REAL) * 3
    norm = Norm("rms", torch.rand(4096, **REAL) + 0.5, None, 1e-5)
    valid = torch.arange(16384, device="cuda")[None] >= 1000
    documents = (torch.arange(256, device="cuda") // 100)[None]
    assert_right(x, norm, net, valid, documents)
    got = assert_right(x, norm, net, None, None)
    own = net(norm_reference(x, norm))
    kept = [set(scores[0].topk(128).indices.tolist()) for scores in (got, own)]
    assert len(kept[0] & kept[1]) >= 125


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "rms", "layer"])
def test_runs_repeat_to_the_bit(kind):
    """No load may overwrite what a tensor core still reads."""
    net = network(4096, 64, units=128, rank=32, longest=1024).cuda()
    x = torch.randn(2, 16384, 4096, **REAL)
    norm = a_norm(kind, 4096, torch.bfloat16)
    norm = norm and moved(norm, device="cuda")
    run = partial(predict_blocks, x, norm, dict(net.named_parameters()), 64, longest=1024)
    first = run()
    assert first.isfinite().all() and all(torch.equal(run(), first) for _ in range(50))


@pytest.mark.gpu
def test_a_stream_beyond_two_to_the_31_elements():
    net = network(4096, 64, units=32, rank=32, longest=1024, **HEADS["causal"]).cuda()
    x = torch.zeros(1, 600_000, 4096, **REAL)
    x[:, -1000:].normal_()
    norm = Norm("rms", torch.ones(4096, **REAL), None, 1e-5)
    documents = torch.zeros(1, 9375, dtype=torch.long, device="cuda")
    documents[:, -15:] = 1
    weights = dict(net.named_parameters())
    got = predict_blocks(x, norm, weights, 64, longest=1024, normalize=True, documents=documents)
    tail = predict_blocks(x[:, -960:], norm, weights, 64, longest=1024, normalize=True)
    torch.testing.assert_close(got[:, -15:], tail)
