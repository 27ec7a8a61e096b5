"""Keys that heads share, repeated for kernels that want as many of them as of queries."""

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from transformers.integrations import sdpa_attention

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core import whole_heads
from lemo_hf.kernels import launch


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("retention", [1.0, 0.5])
def test_nothing_but_the_number_of_key_heads_changes(family, retention, monkeypatch):
    model = with_lora(make_model(family, "sdpa"))
    apply_lemo(model, LeMoConfig(retention=retention, block_size=8, policy="recent"))
    expected, truth = loss_and_gradients(model, **batch())
    seen = []

    def attend(query, key, value, *args, **kwargs):
        seen.append((query.shape[1], key.shape[1], value.shape[1], kwargs.get("enable_gqa", False)))
        return original(query, key, value, *args, **kwargs)

    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa_attention.torch.nn.functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(whole_heads, "are_needed", lambda *_: True)
    found, gradients = loss_and_gradients(model, **batch())
    assert seen
    assert all(heads == keys == values and not shared for heads, keys, values, shared in seen)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, gradient in truth.items():
        if gradient.any():
            assert relative_error(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize(
    ("environment", "capability", "why"),
    [
        ({}, (8, 0), None),
        ({}, (7, 5), "compute capability 7.5, Triton needs 8.0"),
        ({"LEMO_TRITON": "0"}, (9, 0), "LEMO_TRITON=0"),
    ],
)
def test_old_gpus_have_no_kernels(environment, capability, why, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})
    monkeypatch.setattr(launch, "WIDENING", {"cuda"})
    launch.settle.cache_clear()
    try:
        assert launch.settle("cpu") is None
        assert launch.settle("cuda") == why
        assert launch.DEVICES == launch.WIDENING == ({"cuda"} if why is None else set())
        attention = make_model("llama", "sdpa").model.layers[0].self_attn
        assert whole_heads.are_needed(attention, torch.device("cuda")) == (why is not None)
        assert not whole_heads.are_needed(attention, torch.device("cpu"))
    finally:
        launch.settle.cache_clear()
