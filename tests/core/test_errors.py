"""Bad input gets a clear error before training starts."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from support.models import batch, make_model
from support.trainers import dataset, make_trainer
from transformers import AutoModel, DynamicCache

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.checks import check_trainer

pytestmark = pytest.mark.oldest

CONFIG = LeMoConfig(block_size=8)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="needs a transformers causal LM, got Linear"):
        apply_lemo(torch.nn.Linear(2, 2), CONFIG)
    headless = AutoModel.from_config(make_model("llama").config)
    with pytest.raises(ValueError, match="no language-model head.*AutoModelForCausalLM"):
        apply_lemo(headless, CONFIG)
    with pytest.raises(ValueError, match="layerdrop=0.1"):
        apply_lemo(make_model("opt", layerdrop=0.1), CONFIG)


def test_a_refused_model_is_left_alone():
    model = make_model("llama")
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="has 3 entries, the model has 4 layers"):
        apply_lemo(model, LeMoConfig(retention=(0.5,) * 3))
    assert [type(m) for m in model.modules()] == classes and not model._forward_pre_hooks
    remove_lemo(model)  # nothing to remove


def test_a_layer_in_two_places_is_refused():
    model = make_model("llama")
    model.model.layers[2] = model.model.layers[0]
    kinds = [type(layer) for layer in model.model.layers]
    with pytest.raises(ValueError, match=r"layers 0 and 2 are one module.*copy\.deepcopy"):
        apply_lemo(model, CONFIG)
    assert [type(layer) for layer in model.model.layers] == kinds
    assert not model._forward_pre_hooks


def test_applying_twice():
    model = make_model("llama")
    apply_lemo(model, CONFIG)
    with pytest.raises(ValueError, match="already has LeMo on it: call remove_lemo"):
        apply_lemo(model, CONFIG)


def test_predictors_and_policy_must_go_together():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"one predictor a layer.*4 layers, given: none"):
        apply_lemo(model, LeMoConfig(policy="predictor"))
    with pytest.raises(ValueError, match="given: 3"):
        apply_lemo(model, LeMoConfig(policy="predictor"), predictors=[len] * 3)
    with pytest.raises(ValueError, match="policy='auto': set policy='predictor'"):
        apply_lemo(model, LeMoConfig(), predictors=[len] * 4)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_a_sparse_pass_does_not_have(name):
    model = make_model("llama")
    apply_lemo(model, CONFIG)
    with pytest.raises(ValueError, match=f"{name}=True is not supported in a sparse training pass"):
        model(**batch(), **{name: True})
    model.eval()
    assert model(**batch(), **{name: True}).loss.isfinite()


def test_a_decoder_called_without_its_causal_lm_does_not_run_dense_unnoticed():
    model = make_model("llama")
    apply_lemo(model, CONFIG)
    ids = batch()["input_ids"]
    for call in (
        lambda: model.model(input_ids=ids, use_cache=False),
        lambda: model.model(input_ids=ids),  # which makes itself an empty cache
        lambda: model.forward(**batch()),  # past the hooks
    ):
        with pytest.raises(RuntimeError, match=r"layer 0 was called in training mode outside a"):
            call()
    model.eval()
    assert model.model(input_ids=ids).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model.train()()


def test_flex_attention_is_refused():
    with pytest.raises(ValueError, match="flex_attention' is not supported.*Use 'sdpa'"):
        apply_lemo(make_model("llama", "flex_attention"), CONFIG)
    model = make_model("llama")
    lemo = apply_lemo(model, CONFIG)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention' is not supported.*Use 'sdpa'"):
        model(**batch())
    assert lemo.passes.current is None


def test_trainer_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"lemo_config must be a LeMoConfig, got \{'retention'"):
        make_trainer(tmp_path, {"retention": 0.5})
    with pytest.raises(ValueError, match="block_size=128 is larger than the longest sequence"):
        make_trainer(tmp_path, LeMoConfig(block_size=128)).train()
    mixed = [*dataset(3, tokens=20), *dataset(1, tokens=140)]
    make_trainer(
        tmp_path, LeMoConfig(block_size=128), data=mixed, max_steps=1, per_device_train_batch_size=1
    ).train()


def test_ways_of_using_several_gpus():
    one = SimpleNamespace(n_gpu=1)
    check_trainer(one, None)
    check_trainer(one, SimpleNamespace(tp_size=1, cp_size=1, sp_size=None, dp_shard_size=8))
    with pytest.raises(ValueError, match="4 GPUs in one process means torch.nn.DataParallel"):
        check_trainer(SimpleNamespace(n_gpu=4), None)
    for name, what in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        with pytest.raises(ValueError, match=f"{name}_size=2: {what} parallelism"):
            check_trainer(one, SimpleNamespace(**{f"{name}_size": 2}))


def test_a_training_pass_with_a_cache_is_dense_and_says_so(caplog):
    model = make_model("llama")
    lemo = apply_lemo(model, CONFIG)
    for _ in range(2):
        assert model(**batch(), past_key_values=DynamicCache()).loss.isfinite()
    assert caplog.text.count("a training pass with past_key_values and labels is the plain") == 1
    assert not lemo.report()


def test_a_refusal_leaves_the_model_as_it_was():
    model = make_model("llama")
    with pytest.raises(ValueError, match="recompute has 2 entries, the model has 4 layers"):
        apply_lemo(model, LeMoConfig(block_size=8, recompute=("full", "full")))
    assert not model._forward_pre_hooks and not model._forward_hooks
    lemo = apply_lemo(model, CONFIG)
    model(**batch()).loss.backward()
    assert lemo.report()


def test_layers_that_do_something_else():
    """LeMo would not call what was put around a layer, or into it, and the layer would be dense."""
    spread = make_model("llama")
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts += [f"model.layers.{i}" for i in range(4)]
    dispatch_model(spread, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    with pytest.raises(ValueError, match=r"layer 0 has hooks of accelerate.*on one device"):
        apply_lemo(spread, CONFIG)

    wrapped = make_model("llama")
    layer = wrapped.model.layers[2]
    stock = layer.forward
    layer.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    with pytest.raises(ValueError, match="the forward of layer 2 is not that of transformers' Lla"):
        apply_lemo(wrapped, CONFIG)

    class Own(type(layer)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 0.9

    subclassed = make_model("llama")
    subclassed.model.layers[1].__class__ = Own
    with pytest.raises(ValueError, match="the forward of layer 1 is not that of transformers' Own"):
        apply_lemo(subclassed, CONFIG)
