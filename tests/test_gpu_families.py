"""On a CUDA GPU: each family of the table and each multimodal type, by what the CPU computes."""

import pytest
import torch
from support.models import EAGER, VARIANTS, batch, loss_and_gradients, make_model, with_lora
from support.multimodal import PARTS, assert_stock, multimodal, with_images

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.sink_attention import NAME

pytestmark = pytest.mark.gpu
SINKS = "gpt_oss with lemo_sinks"


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 means fp32: vision towers begin with a convolution, which takes TF32 by default."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def on_the_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def built(family):
    name = "gpt_oss" if family == SINKS else family
    model = with_lora(make_model(name, "eager" if name in EAGER else "sdpa", num_hidden_layers=2))
    if family == SINKS:
        model.set_attn_implementation(NAME)
    return model


def half(model, inputs):
    """Loss and gradients of a pass that leaves tokens out."""
    lemo = apply_lemo(model, LeMoConfig(retention=0.5, block_size=8, policy="recent"))
    found = loss_and_gradients(model, **inputs)
    kept = lemo.report()["kept_tokens"]
    remove_lemo(model)
    assert 0 < kept < inputs["input_ids"].numel()
    return found


def check(model, inputs):
    """At 0.5 what the CPU computes; at 1, in bfloat16 too, no further off than the stock model."""
    truth = half(model, inputs)
    stock = loss_and_gradients(model, **inputs)
    model, inputs = model.cuda(), on_the_gpu(inputs)
    loss, gradients = half(model, inputs)
    found = loss, {name: gradient.cpu() for name, gradient in gradients.items()}
    assert_stock(found, truth, bound=1e-3)

    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8))
    loss, gradients = loss_and_gradients(model, **inputs)
    assert_stock((loss, {n: g.cpu() for n, g in gradients.items()}), stock, bound=1e-3)
    remove_lemo(model)
    model.bfloat16()
    inputs = {n: x.bfloat16() if x.is_floating_point() else x for n, x in inputs.items()}
    expected = loss_and_gradients(model, **inputs)[0]
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8))
    found = loss_and_gradients(model, **inputs)[0]
    assert abs(found - stock[0]) <= 2 * abs(expected - stock[0]) + 0.02 * abs(stock[0])


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS, SINKS])
def test_a_family(family):
    check(built(family), batch())


@pytest.mark.parametrize("name", PARTS)
def test_images(name):
    model = multimodal(name)
    inputs = batch(tokens=118)
    inputs["labels"][:, :-12] = -100
    check(model, with_images(model, inputs, [(0, 10), (0, 60), (1, 20)]))
