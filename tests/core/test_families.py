"""Every row of the family table: at retention 1 the sparse path is the stock model."""

import copy

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from torch.nn.functional import cross_entropy

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.config import LEVELS
from lemo_hf.core.families import FAMILIES, PARALLEL_RESIDUAL, family_of

pytestmark = pytest.mark.oldest


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def exact_gradients(model, input_ids, labels):
    """Of the stock model in fp64 (its norms stay fp32 where transformers casts them)."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the others have no fp64
    logits = model(input_ids=input_ids).logits.double()
    cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("mlp_retention", [None, 1.0])
def test_retention_1_is_the_stock_model(family, mlp_retention, recompute):
    model = with_lora(make_model(family))
    keys = list(model.state_dict())
    loss, gradients = loss_and_gradients(model, **batch())
    exact = exact_gradients(model, **batch())
    config = LeMoConfig(
        retention=1.0,
        mlp_retention=mlp_retention,
        block_size=16,
        segment_size=29,
        policy="recent",
        recompute=recompute,
    )
    lemo = apply_lemo(model, config)
    assert list(model.state_dict()) == keys
    sparse_loss, sparse_gradients = loss_and_gradients(model, **batch())
    assert lemo.report()["kept_tokens"] == 2 * 70
    assert sparse_loss == pytest.approx(loss, rel=1e-6)
    assert sparse_gradients.keys() == gradients.keys() == exact.keys()
    error, stock = (
        max(relative_error(found[name], exact[name]) for name in exact)
        for found in (sparse_gradients, gradients)
    )
    assert error <= 2 * stock < 1e-5


def test_remove_gives_the_stock_model_back(family):
    model = make_model(family)
    classes = [type(module) for module in model.modules()]
    before = loss_and_gradients(model, **batch())
    apply_lemo(model, LeMoConfig(block_size=16))
    assert loss_and_gradients(model, **batch())[0] != before[0]
    remove_lemo(model)
    after = loss_and_gradients(model, **batch())
    assert [type(module) for module in model.modules()] == classes
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_evaluation_and_generation_are_the_stock_model(family, implementation):
    if family == "gemma2" and implementation == "sdpa":
        pytest.skip("Gemma 2's soft cap needs eager attention")
    model = make_model(family, implementation).eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        text = model.generate(ids[:, :9], max_new_tokens=5, do_sample=False)
        apply_lemo(model, LeMoConfig(block_size=16))
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert torch.equal(model.generate(ids[:, :9], max_new_tokens=5, do_sample=False), text)
        model.train()  # generation in training mode fills a cache, so it stays dense too
        assert torch.equal(model.generate(ids[:, :9], max_new_tokens=5, do_sample=False), text)


def test_saved_model_loads_without_lemo(family, tmp_path):
    model = make_model(family)
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


def test_a_copy_of_the_model_runs_on_its_own(family):
    model = make_model(family)
    apply_lemo(model, LeMoConfig(block_size=16))
    twin = copy.deepcopy(model)
    loss = loss_and_gradients(model, **batch())
    assert loss_and_gradients(twin, **batch())[0] == loss[0]
    remove_lemo(model)
    assert loss_and_gradients(twin, **batch())[0] == loss[0]


def test_unknown_families_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'bloom' is not supported.*add one.*llama"):
        family_of("bloom")
    for model_type in PARALLEL_RESIDUAL:
        with pytest.raises(ValueError, match=f"'{model_type}' is not supported.*parallel"):
            family_of(model_type)
