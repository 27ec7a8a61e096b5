"""Kernels inside the layers: the same numbers, and modules that must be called are called."""

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama import modeling_llama

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.fused import gated_activations, norm_of
from lemo_hf.kernels.norm import Norm

# All kinds of norms, gates and rotary positions; the other families have one of these.
KINDS = ("llama", "gemma3_text", "granite", "olmo2", "phi3", "opt", "glm", "cohere", "mixtral")
REST = pytest.mark.soak


def tiny(family, **overrides):
    return make_model(family, "sdpa", num_hidden_layers=2, **overrides)


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        *(pytest.param(name, False, marks=() if name in KINDS else REST) for name in FAMILIES),
        *((name, True) for name in ("llama", "olmo2", "opt")),
    ],
)
def test_kernels_in_every_family(family, checkpointing, kernels_on):
    """At retention 1, norms trained as well, the stock model's loss and gradients."""
    model = with_lora(tiny(family)).to(kernels_on)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_()
    inputs = {name: value.to(kernels_on) for name, value in batch(2, 9).items()}
    stock, expected = loss_and_gradients(model, **inputs)
    apply_lemo(model, LeMoConfig(retention=1.0, recompute="full" if checkpointing else "none"))
    loss, gradients = loss_and_gradients(model, **inputs)
    assert loss == pytest.approx(stock, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_family_lets_kernels_do(family):
    model = tiny(family)
    layer = model.get_submodule(FAMILIES[family].layers)[0]
    row = FAMILIES[family]
    for name in (row.attention_norm, row.mlp_norm, row.attention_output_norm):
        found = None if name is None else norm_of(getattr(layer, name), row.norm)
        assert name is None or isinstance(found, Norm) == (row.norm != "own")
    assert (gated_activations(layer, row) is not None) == bool(row.gate)


def test_hooks_and_replaced_forwards_are_respected():
    """Whoever hangs on a module's call, or replaced it, sees it called as in the stock model."""
    model = tiny("llama")
    layer = model.model.layers[0]
    seen = []
    hooked = [layer.input_layernorm, layer.mlp, layer.mlp.gate_proj, layer.self_attn.q_proj]
    for module in hooked:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    norm, attention = layer.post_attention_layernorm, layer.self_attn
    norm.forward = lambda hidden, f=norm.forward: seen.append(norm) or f(hidden)

    def attend(*args, f=attention.forward, **kwargs):
        assert all(torch.is_tensor(part) for part in kwargs["position_embeddings"])
        seen.append(attention)
        return f(*args, **kwargs)

    attention.forward = attend
    stock = model.eval()(**batch(2, 21)).loss
    expected, seen[:] = list(seen), []
    apply_lemo(model.train(), LeMoConfig(retention=1.0))
    loss = model(**batch(2, 21)).loss
    assert seen == expected and len(seen) == 6
    assert loss.item() == pytest.approx(stock.item(), rel=1e-6)


def test_a_norm_that_is_not_transformers_own_is_called():
    class Norm(modeling_llama.LlamaRMSNorm):
        pass

    assert norm_of(Norm(8), "rms") is None
    assert norm_of(modeling_llama.LlamaRMSNorm(8), "rms").eps == 1e-6
    assert norm_of(torch.nn.LayerNorm(8, elementwise_affine=False), "layer") is None


def test_rotary_is_replaced_for_the_call_alone():
    model = tiny("llama")
    apply_lemo(model, LeMoConfig(block_size=8))
    original = modeling_llama.apply_rotary_pos_emb
    model(**batch(2, 21)).loss.backward()
    assert modeling_llama.apply_rotary_pos_emb is original
    assert all("forward" not in vars(layer.self_attn) for layer in model.model.layers)


def test_a_fused_pass_saves_less(kernels_on):
    """No copy of the activation, no fp32 copy for a norm, no gathered cos and sin."""
    model = with_lora(tiny("llama", intermediate_size=96), target_modules=["q_proj"])
    model = model.to(kernels_on).bfloat16()
    apply_lemo(model, LeMoConfig(retention=1.0))
    inputs = {name: value.to(kernels_on) for name, value in batch(2, 5).items()}
    layer = model.get_base_model().model.layers[1]
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (tensor.dtype, tuple(tensor.shape))
        return tensor

    stop = []
    layer.register_forward_pre_hook(
        lambda *_: (
            stop.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
            or stop[0].__enter__()
        )
    )
    layer.register_forward_hook(lambda *_: stop[0].__exit__(None, None, None))
    model(**inputs).loss.backward()
    rows = [shape for dtype, shape in saved.values() if shape[:2] == (2, 5)]
    assert rows.count((2, 5, 96)) == 2  # gate and up
    assert all(dtype != torch.float32 for dtype, shape in saved.values() if shape[:2] == (2, 5))


def doubled(old):
    return lambda *args, **kwargs: old(*args, **kwargs) * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model, patch: patch.setattr(
            modeling_llama.LlamaMLP, "forward", doubled(modeling_llama.LlamaMLP.forward)
        ),
        lambda model, patch: patch.setattr(
            modeling_llama.LlamaRMSNorm, "forward", doubled(modeling_llama.LlamaRMSNorm.forward)
        ),
        lambda model, patch: patch.setattr(
            modeling_llama, "apply_rotary_pos_emb", lambda q, k, *args: (q, k)
        ),
        lambda model, patch: model.model.layers[0].mlp.act_fn.register_forward_hook(
            lambda module, args, out: out * 2
        ),
    ],
    ids=["MLPs", "norms", "rotary positions", "an activation"],
)
def test_what_a_user_changed_is_what_trains(change, monkeypatch):
    model = tiny("llama")
    stock, _ = loss_and_gradients(model, **batch(2, 9))
    change(model, monkeypatch)
    expected, _ = loss_and_gradients(model, **batch(2, 9))
    assert expected != pytest.approx(stock, abs=1e-3)
    apply_lemo(model, LeMoConfig(retention=1.0))
    assert loss_and_gradients(model, **batch(2, 9))[0] == pytest.approx(expected, rel=1e-6)


def test_hooks_on_all_modules():
    model = tiny("llama")

    def halve(module, args, out):
        return out / 2 if isinstance(module, modeling_llama.LlamaRMSNorm) else None

    handle = register_module_forward_hook(halve)
    try:
        expected, _ = loss_and_gradients(model, **batch(2, 9))
        apply_lemo(model, LeMoConfig(retention=1.0))
        assert loss_and_gradients(model, **batch(2, 9))[0] == pytest.approx(expected, rel=1e-6)
    finally:
        handle.remove()


def test_a_subclass_of_the_attention_is_called_itself():
    class Own(modeling_llama.LlamaAttention):
        def forward(self, *args, **kwargs):
            assert isinstance(self, torch.nn.Module)
            out, weights = super().forward(*args, **kwargs)
            return out * 0.5, weights

    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Own
    expected, _ = loss_and_gradients(model, **batch(2, 9))
    apply_lemo(model, LeMoConfig(retention=1.0))
    assert loss_and_gradients(model, **batch(2, 9))[0] == pytest.approx(expected, rel=1e-6)


def test_a_hook_on_the_backward_of_the_head():
    model = tiny("llama")
    stock, expected = loss_and_gradients(model, **batch(2, 9))
    model.lm_head.register_full_backward_hook(lambda *_: None)
    apply_lemo(model, LeMoConfig(retention=1.0))
    loss, gradients = loss_and_gradients(model, **batch(2, 9))
    assert loss == pytest.approx(stock, rel=1e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize("place", ["embed_tokens", "layers.0", "layers.1"])
def test_hooks_whose_backward_reads_what_they_return(place):
    model = tiny("llama")
    model.model.get_submodule(place).register_forward_hook(lambda module, args, out: out.tanh())
    stock, expected = loss_and_gradients(model, **batch(2, 9))
    apply_lemo(model, LeMoConfig(retention=1.0))
    loss, gradients = loss_and_gradients(model, **batch(2, 9))
    assert loss == pytest.approx(stock, rel=1e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name
