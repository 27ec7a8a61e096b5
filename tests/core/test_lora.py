"""LoRA inside one product: what PEFT computes, and PEFT itself wherever it must be called."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lemo_hf.core.lora import linear_of


def lora(dtype=torch.float64, width=12, out=20, bias=False, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out, bias=bias)).to(dtype)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], **options}
    autocast = settings.pop("autocast_adapter_dtype", False)
    model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=autocast)
    layer = model.base_model.model[0]
    if "default" in layer.lora_B:
        nn.init.normal_(layer.lora_B["default"].weight)
    return model, layer


def results(function, layer, x):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    out = function(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return out.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("bias", [False, True])
def test_result_and_gradients_are_pefts(bias):
    _, layer = lora(bias=bias)
    fused = linear_of(layer)
    assert fused is not layer
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for ours, theirs in zip(results(fused, layer, x), results(layer, layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_full_precision_adapters_under_autocast_and_without():
    _, layer = lora(torch.bfloat16, autocast_adapter_dtype=True)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(2, 7, 12).bfloat16()
    fused = linear_of(layer)
    assert torch.equal(fused(x), layer(x))  # PEFT's own
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True, "bias": True}]
)
def test_other_kinds_are_called_as_they_are(options):
    _, layer = lora(torch.float32, **options)
    assert linear_of(layer) is layer


def test_what_hangs_on_the_call_is_respected():
    model, layer = lora()
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    assert linear_of(layer) is layer
    handle.remove()
    with model.disable_adapter():
        assert linear_of(layer) is layer
    layer.merge()
    assert linear_of(layer) is layer
    layer.unmerge()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    assert linear_of(layer) is not layer
    model.base_model.set_adapter(["default", "other"])
    assert linear_of(layer) is layer
    assert linear_of(layer.base_layer) is layer.base_layer
