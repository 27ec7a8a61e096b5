"""Attention with sinks by scaled dot product, against the scores written out."""

from types import SimpleNamespace

import pytest
import torch
from support.batches import left_padded, plain
from support.models import batch, loss_and_gradients, make_model, relative_error
from transformers import AutoModelForCausalLM

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.sink_attention import NAME, attend_with_sinks


def written_out(query, key, value, visible, scaling, sinks):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~visible, -torch.inf)
    scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    return (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2)


@pytest.mark.parametrize("case", ["causal", "bool", "additive", "one query"])
def test_it_is_the_softmax_with_one_more_score(case):
    """In fp64, with 3 query heads a key head; values and every gradient."""
    count = 1 if case == "one query" else 11
    query = torch.randn(2, 6, count, 5, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, 11, 5, dtype=torch.float64, requires_grad=True) for _ in "kv")
    sinks = torch.randn(6, dtype=torch.float64, requires_grad=True)
    visible = torch.ones(2, 1, count, 11, dtype=torch.bool)
    if count > 1:
        visible = visible.tril()
    mask = None
    if case in ("bool", "additive"):
        visible[1, :, :, :3] = False
        visible[1, :, :3, 0] = True
        mask = visible
    if case == "additive":
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e300)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    found, weights = attend_with_sinks(module, query, key, value, mask, 0.3, sinks, dropout=0.0)
    expected = written_out(query, key, value, visible, 0.3, sinks)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # sinks pass through fp32
    ask, inputs = torch.randn_like(expected), (query, key, value, sinks)
    gradients = zip(
        torch.autograd.grad(found, inputs, ask),
        torch.autograd.grad(expected, inputs, ask),
        strict=True,
    )
    for gradient, truth in gradients:
        torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-6)


def gpt_oss():
    model = make_model("gpt_oss")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("case", [plain, left_padded])
def test_a_sparse_pass_is_that_of_eager_attention(case):
    model = gpt_oss()
    results = []
    for attention in ("eager", NAME):
        model.set_attn_implementation(attention)
        lemo = apply_lemo(model, LeMoConfig(retention=0.5, block_size=8, policy="random"))
        assert (NAME in lemo.describe()) and ("stores none" in lemo.describe()) == (
            attention == "eager"
        )
        results.append(loss_and_gradients(model, **case()))
        remove_lemo(model)
    (expected, truth), (found, gradients) = results
    assert found == pytest.approx(expected, rel=1e-6)
    assert any(name.endswith("sinks") and truth[name].any() for name in truth)
    for name, gradient in truth.items():
        if gradient.any():
            assert relative_error(gradients[name], gradient) < 1e-5, name


def test_a_checkpoint_is_loaded_with_it_and_generates_as_with_eager(tmp_path):
    gpt_oss().save_pretrained(tmp_path)
    ids = batch()["input_ids"][:, :30]
    texts = []
    for attention in ("eager", NAME):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(*texts)
    assert NAME not in (tmp_path / "config.json").read_text()
