"""FP8 copies follow their weights, whoever changes them, and each model has its own switch."""

import copy
import weakref

import pytest
import torch
from support.fp8_cases import HALF, copies_of, few_rows, in_fp8  # noqa: F401
from support.models import batch, loss_and_gradients, make_model, with_lora
from support.trainers import losses, make_trainer
from torch import nn
from torch.nn.utils import parametrize

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core import fp8_switch
from lemo_hf.patch import lemo_of


def test_copies_follow_the_weights():
    model = with_lora(make_model("llama"))
    apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    before = loss_and_gradients(model, **batch())[0]
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(-1)
    changed = loss_and_gradients(model, **batch())[0]
    assert changed != before
    with torch.no_grad():
        weight.mul_(-1)
    assert loss_and_gradients(model, **batch())[0] == before


def merge(model):
    model.merge_adapter()
    return model


def merge_and_back(model):
    """With a pass between: a merged layer has a copy of what is merged."""
    model.merge_adapter()
    loss_of(model)
    model.unmerge_adapter()
    return model


def unload(model):
    return model.merge_and_unload()


def start_over(model):
    """ReLoRA: merged, with new adapters."""
    return with_lora(model.merge_and_unload())


def move(model):
    frozen = weight_of(model)
    frozen.data = frozen.data * 1.5
    return model


def replace(model):
    owner = linear_under_test(model)
    owner.weight = nn.Parameter(owner.weight.detach() * 1.5, requires_grad=False)
    return model


def linear_under_test(model):
    return model.get_base_model().model.layers[1].mlp.up_proj.base_layer


def weight_of(model):
    return linear_under_test(model).weight


def loss_of(model):
    with torch.no_grad():
        return model(**batch()).loss.item()


def expect_copies_of_now(model, inner):
    """As of LeMo that is put on the model now."""
    found = loss_of(model)
    remove_lemo(inner)
    apply_lemo(inner, LeMoConfig(**HALF, fp8=True))
    assert loss_of(model) == found


@pytest.mark.parametrize("change", [merge, merge_and_back, unload, start_over, move, replace])
def test_merged_and_moved_weights_are_seen_at_once(change, monkeypatch):
    """Also where a change of numbers is seen late."""
    monkeypatch.setattr(fp8_switch._Sample, "differs", lambda _: False)
    model = with_lora(make_model("llama"))
    inner = model.get_base_model()
    apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    loss_of(model)
    old = copies_of(inner)
    model = change(model)
    loss_of(model)
    for name, copy_of_now in copies_of(inner).items():
        if change not in (move, replace) or "layers.1.mlp.up_proj" in name:
            assert all(copy_of_now is not one for one in old.values()), name
    expect_copies_of_now(model, inner)


@pytest.mark.parametrize(
    "place", [slice(None), 5, (slice(None), 3)], ids=["a weight", "a row", "a column"]
)
def test_numbers_that_change_past_pytorchs_count_are_seen(place):
    model = with_lora(make_model("llama"))
    lemo = apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    before = loss_of(model)
    changes = lemo.passes.fp8.changes
    weight = weight_of(model)
    version = weight._version
    weight.data[place] += 1
    assert weight._version == version
    assert loss_of(model) != before
    assert lemo.passes.fp8.changes == changes + 1
    loss_of(model)
    assert lemo.passes.fp8.changes == changes + 1
    expect_copies_of_now(model, model)


def test_a_weight_that_is_parametrized_since_is_left_to_its_linear():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = with_lora(make_model("llama"))
    apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    loss_of(model)
    parametrize.register_parametrization(linear_under_test(model), "weight", Doubled())
    found = loss_of(model)
    parametrize.remove_parametrizations(linear_under_test(model), "weight")
    assert found == pytest.approx(loss_of(model), rel=1e-2)
    expect_copies_of_now(model, model)


def test_a_run_has_copies_of_the_weights_as_they_are_when_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_switch.Fp8Switch, "look", lambda _: None)
    config = LeMoConfig(**HALF, fp8=True, bf16_finish=0, dense_finish=0)
    model = with_lora(make_model("llama"))
    options = {"max_steps": 1, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, config, model=model, **options)
    first = losses(trainer)
    assert not any(copies_of(model).values())
    weight_of(model).data.mul_(3)
    second = losses(trainer)
    remove_lemo(model)
    fresh = losses(make_trainer(tmp_path, config, model=model, **options))
    assert second == fresh != first


@pytest.mark.gpu
def test_the_host_does_not_wait_to_see_a_change(caplog):
    """On a GPU the pass after the next has copies of it, and the log says so."""
    model = with_lora(make_model("llama").cuda().to(torch.bfloat16))
    apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    inputs = {name: x.cuda() for name, x in batch().items()}
    switch = lemo_of(model).passes.fp8
    for _ in range(3):
        model(**inputs).loss.backward()
    changes = switch.changes
    weight_of(model).data.mul_(-1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        switch.look()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert switch.changes == changes and not caplog.text
    torch.cuda.synchronize()
    switch.look()
    assert switch.changes == changes + 1
    assert "changed past PyTorch's count of changes" in caplog.text
    assert all(copy_of_now.stale for copy_of_now in copies_of(model).values())


def test_a_deep_copy_is_in_fp8_as_its_model_is():
    model = with_lora(make_model("llama"))
    lemo = apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    expected = loss_of(model)
    twin = copy.deepcopy(model)
    assert copies_of(twin).keys() == copies_of(model).keys()
    assert loss_of(twin) == expected
    assert not set(copies_of(twin).values()) & set(copies_of(model).values())
    lemo.set_fp8(False)
    assert in_fp8(twin) and not in_fp8(model) and not in_fp8(copy.deepcopy(model))
    remove_lemo(model)
    assert loss_of(twin) == expected


def sharing(model):
    """Another model with the same parameters."""
    return copy.deepcopy(model, {id(x): x for x in model.parameters()})


def test_models_that_share_weights_share_copies_and_nothing_else():
    one = with_lora(make_model("llama"))
    other = sharing(one)
    lemo = apply_lemo(one, LeMoConfig(**HALF, fp8=True))
    second = apply_lemo(other, LeMoConfig(**HALF))
    plain = loss_of(other)
    assert in_fp8(one) and not in_fp8(other) and loss_of(one) != plain
    remove_lemo(other)
    second = apply_lemo(other, LeMoConfig(**HALF, fp8=True))
    expected = loss_of(one)
    assert loss_of(other) == expected and copies_of(one) == copies_of(other)
    lemo.begin_step(3, 4)  # in bf16
    assert second.passes.in_fp8 and loss_of(other) == expected
    assert loss_of(one) == plain
    lemo.begin_step(0, 4)
    assert loss_of(one) == expected and copies_of(one) == copies_of(other)
    second.set_fp8(False)
    lemo.set_fp8(True)
    assert loss_of(other) == plain
    second.set_fp8(True)
    remove_lemo(one)
    assert in_fp8(other) and loss_of(other) == expected
    freed = [weakref.ref(x) for x in copies_of(other).values()]
    remove_lemo(other)
    assert not any(ref() for ref in freed)


def test_a_change_that_one_model_sees_is_seen_by_those_that_share_its_weights(monkeypatch):
    monkeypatch.setattr(fp8_switch._Sample, "differs", lambda _: False)
    one = with_lora(make_model("llama"))
    other = sharing(one)
    for model in (one, other):
        apply_lemo(model, LeMoConfig(**HALF, fp8=True))
        loss_of(model)
    one.merge_adapter()
    loss_of(one)
    assert copies_of(one) == {k: v for k, v in copies_of(one).items() if not v.stale}
    found = loss_of(other)
    assert copies_of(one) == copies_of(other)
    expect_copies_of_now(other, other)
    assert loss_of(other) == found
