"""Every row of the family table: at retention 1 the sparse path is the stock model."""

import copy

import pytest
import torch
from support.models import (
    EAGER,
    VARIANTS,
    batch,
    loss_and_gradients,
    make_model,
    relative_error,
    with_lora,
)
from torch.nn.functional import cross_entropy

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.families import FAMILIES, family_of
from lemo_hf.tune.looked_at import LookedAt


@pytest.fixture(params=[*FAMILIES, *VARIANTS])
def family(request):
    return request.param


def exact_gradients(model, input_ids, labels):
    """Of the stock model in fp64 (its norms stay fp32 where transformers casts them)."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the others have no fp64
    logits = model(input_ids=input_ids).logits.double()
    cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.oldest
def test_retention_1_is_the_stock_model(family):
    """One stock reference; at each level of recomputation, with each attention, checkpointed."""
    model = with_lora(make_model(family, num_hidden_layers=2))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.requires_grad_()
    keys = list(model.state_dict())
    loss, gradients = loss_and_gradients(model, **batch())
    exact = exact_gradients(model, **batch())
    worst = max(relative_error(gradients[name], exact[name]) for name in moved(exact))
    row = family_of(model.get_base_model().config)
    long = row.recurrent is not None or row.layer_input  # rounding adds up
    bound = 1e-4 if long else 1e-5
    runs = [{"recompute": "none"}, {"recompute": "mlp"}]
    runs += [
        {"recompute": "full", "mlp_retention": None if row.parallel or row.layer_scale else 1.0},
        {},
    ]
    runs += [] if family in EAGER else [{"attention": "sdpa"}]
    runs += [{"attention": "lemo_sinks"}] if family == "gpt_oss" else []
    for run in runs:
        attention = run.pop("attention", "eager")
        model.set_attn_implementation(attention)
        if not run:
            model.gradient_checkpointing_enable()
        config = LeMoConfig(retention=1.0, block_size=16, segment_size=29, policy="recent", **run)
        lemo = apply_lemo(model, config)
        assert list(model.state_dict()) == keys
        found = loss_and_gradients(model, **batch())
        assert lemo.report()["kept_tokens"] == 2 * 70
        remove_lemo(model)
        model.gradient_checkpointing_disable()
        if attention == "sdpa" and family == "falcon-rw":
            continue  # transformers adds its ALiBi twice where it is eager, and once by sdpa
        assert found[0] == pytest.approx(loss, rel=1e-6), run
        assert found[1].keys() == gradients.keys() == exact.keys()
        error = max(relative_error(found[1][name], exact[name]) for name in moved(exact))
        assert error <= (2 * worst if attention == "eager" else bound) and worst < bound, run


def moved(gradients):
    """Names of gradients that are more than rounding: keys' biases move no softmax."""
    most = max(gradient.norm() for gradient in gradients.values())
    return [name for name, gradient in gradients.items() if gradient.norm() > 1e-6 * most]


def test_remove_gives_the_stock_model_back(family):
    """And a copy of a model with LeMo runs on its own."""
    model = make_model(family, num_hidden_layers=2)
    classes = [type(module) for module in model.modules()]
    before = loss_and_gradients(model, **batch())
    apply_lemo(model, LeMoConfig(block_size=16))
    twin = copy.deepcopy(model)
    sparse = loss_and_gradients(model, **batch())[0]
    assert sparse != before[0]
    remove_lemo(model)
    after = loss_and_gradients(model, **batch())
    assert [type(module) for module in model.modules()] == classes
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])
    assert loss_and_gradients(twin, **batch())[0] == sparse


def test_evaluation_and_generation_are_the_stock_model(family):
    model = make_model(family, "sdpa", num_hidden_layers=2).eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        text = model.generate(ids[:, :9], max_new_tokens=4, do_sample=False)
        apply_lemo(model, LeMoConfig(block_size=16))
        assert torch.equal(model(input_ids=ids).logits, logits)
        model.train()  # generation in training mode fills a cache, so it stays dense too
        assert torch.equal(model.generate(ids[:, :9], max_new_tokens=4, do_sample=False), text)


def test_saved_model_loads_without_lemo(family, tmp_path):
    model = make_model(family, num_hidden_layers=2)
    apply_lemo(model, LeMoConfig(block_size=16))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    remove_lemo(model)
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("name", ["falcon", "falcon-rw", "stablelm-parallel", "bloom"])
def test_what_a_config_can_ask_and_layers_cannot(name):
    model = make_model(name)
    model.config.hidden_dropout = 0.1
    model.config.apply_residual_connection_post_layernorm = True
    if name in ("falcon", "bloom"):
        with pytest.raises(ValueError, match="hidden_dropout=0.1|post_layernorm=True"):
            family_of(model.config)
    else:
        assert family_of(model.config).parallel == (name == "stablelm-parallel")


def test_what_a_family_does_not_let_lemo_do():
    model = make_model("phi")
    with pytest.raises(ValueError, match="mlp_retention=0.5: .*'phi' read the same rows"):
        apply_lemo(model, LeMoConfig(block_size=8, mlp_retention=0.5))
    with pytest.raises(ValueError, match="policy='pooled': .*'gptj' does not give out its queries"):
        apply_lemo(make_model("gptj"), LeMoConfig(block_size=8, policy="pooled"))
    falcon = make_model("falcon").eval()
    looked = {"input_ids": batch()["input_ids"], "attention_mask": None, "targets": None}
    with pytest.raises(
        ValueError, match="FalconAttention of transformers does not give out its queries"
    ):
        LookedAt(falcon, LeMoConfig(policy="oracle", block_size=8), looked, [3])
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        apply_lemo(make_model("gpt2", add_cross_attention=True), LeMoConfig(block_size=8))
