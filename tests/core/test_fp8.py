"""`fp8`: products with frozen weights alone, near those of the model, and gone when LeMo is."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from support.trainers import losses, make_trainer
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainerCallback

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core import fp8, fp8_switch
from lemo_hf.core.checks import check_trainer
from lemo_hf.core.lora import linear_of
from lemo_hf.describe import describe_run
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.patch import lemo_of

HALF = {"retention": 0.5, "block_size": 8, "policy": "recent"}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(fp8, "FEWEST_ROWS", 8)


def in_fp8(model):
    return any(map(fp8.has_fp8, model.modules()))


def copies_of(model):
    """FP8 copies by the name of their linear; None for one that was not needed yet."""
    return {n: fp8.linears[m].copy for n, m in model.named_modules() if fp8.has_fp8(m)}


def test_a_linear_and_its_gradient():
    """Against products in fp64 with the numbers that FP8 holds."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).requires_grad_(False)
    switch = fp8_switch.Fp8Switch([linear])
    x = torch.randn(64, 32, requires_grad=True)
    out = linear_of(linear)(x)
    grad = torch.randn(64, 48)
    out.backward(grad)
    weight = linear.weight
    exact = x.double() @ weight.double().mT + linear.bias.double()
    assert 1e-3 < relative_error(out, exact) < 0.05
    expected = grad.double() @ weight.double()
    assert 1e-3 < relative_error(x.grad, expected) < 0.06
    switch.remove()
    assert linear_of(linear) is linear


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("options", [{}, {"recompute": "full"}, {"mlp_retention": 0.4}])
def test_passes_are_near_those_without(family, options):
    model = with_lora(make_model(family))
    config = {**HALF, **options}
    if "mlp_retention" in config and family == "opt":
        config["policy"] = "random"
    apply_lemo(model, LeMoConfig(**config))
    loss, gradients = loss_and_gradients(model, **batch())
    remove_lemo(model)
    apply_lemo(model, LeMoConfig(**config, fp8=True))
    found, others = loss_and_gradients(model, **batch())
    remove_lemo(model)
    assert found != loss and found == pytest.approx(loss, rel=5e-3)
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(gradient.flatten(), others[name].flatten(), dim=0)
        assert cosine > 0.93, name  # 32 wide: little averages out
    assert not in_fp8(model) and not any(module in fp8.linears for module in model.modules())
    apply_lemo(model, LeMoConfig(**config))
    assert loss_and_gradients(model, **batch())[0] == loss


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


def test_few_rows_are_multiplied_as_without(monkeypatch):
    monkeypatch.setattr(fp8, "FEWEST_ROWS", 10_000)
    model = with_lora(make_model("llama"))
    apply_lemo(model, LeMoConfig(**HALF))
    loss = loss_and_gradients(model, **batch())[0]
    remove_lemo(model)
    apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    assert loss_and_gradients(model, **batch())[0] == loss


def test_it_trains(tmp_path):
    config = LeMoConfig(**HALF, fp8=True)
    plain = losses(make_trainer(tmp_path, LeMoConfig(**HALF)))
    trainer = make_trainer(tmp_path, config)
    assert losses(trainer) == pytest.approx(plain, rel=1e-2)
    assert "FP8, in bf16 in the last 30% of the steps." in trainer.lemo.describe()


@pytest.mark.parametrize(
    ("finish", "bf16", "expected"),
    [
        (0.25, None, [(None, True)] * 3 + [(1.0, False)]),
        (0.25, 0.5, [(None, True)] * 2 + [(None, False), (1.0, False)]),
        (0.5, 0.25, [(None, True)] * 2 + [(1.0, True), (1.0, False)]),
        (0, 0, [(None, True)] * 4),
        (0, 1e-3, [(None, True)] * 3 + [(None, False)]),
    ],
)
@pytest.mark.parametrize("by", ["LeMoTrainer", "LeMoCallback"])
def test_the_last_steps_are_in_bf16(finish, bf16, expected, by, tmp_path):
    """From the first of them on nothing is in FP8; the next run begins in FP8 again."""
    share = {} if bf16 is None else {"bf16_finish": bf16}
    config = LeMoConfig(**HALF, fp8=True, dense_finish=finish, **share)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *_, model, **__):
            lemo = lemo_of(model)
            seen.append((lemo.passes.retention, in_fp8(model)))
            assert lemo.passes.in_fp8 == in_fp8(model)

    if by == "LeMoTrainer":
        trainer = make_trainer(tmp_path, config, callbacks=[Look()])
    else:
        callbacks = [LeMoCallback(config), Look()]
        trainer = make_trainer(tmp_path, None, cls=Trainer, callbacks=callbacks)
    for _ in range(2):
        trainer.train()
    assert seen == 2 * expected
    assert in_fp8(trainer.model) == (by == "LeMoTrainer")
    said = "in FP8, in bf16 in the last" if bf16 != 0 else "in FP8. "
    assert said in describe_run(config, config.layer_rules(4), "sdpa", None)


@pytest.mark.parametrize("by", ["LeMoTrainer", "LeMoCallback"])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_that_are_trained_at_the_end_do_not_break_it_off(by, fails, tmp_path):
    """Nor do they hide the user's own error."""
    config = LeMoConfig(**HALF, fp8=True)

    class Thaws(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 4:
                model.requires_grad_(True)
                if fails:
                    raise OSError("the user's")

    if by == "LeMoTrainer":
        trainer = make_trainer(tmp_path, config, callbacks=[Thaws()])
    else:
        callbacks = [LeMoCallback(config), Thaws()]
        trainer = make_trainer(tmp_path, None, cls=Trainer, callbacks=callbacks)
    with pytest.raises(OSError, match="the user's") if fails else nullcontext():
        trainer.train()
    assert trainer.state.global_step == 4


def test_a_small_share_is_not_called_none():
    config = LeMoConfig(fp8=True, bf16_finish=0.001, dense_finish=0.002)
    text = describe_run(config, config.layer_rules(4), "sdpa", None)
    assert "bf16 in the last 0.1% of the steps" in text
    assert "The last 0.2% of the steps are dense" in text


def test_a_share_without_fp8_is_said_to_have_no_effect():
    for share, said in ((0.3, False), (0.5, True)):
        config = LeMoConfig(bf16_finish=share)
        text = describe_run(config, config.layer_rules(4), "sdpa", None)
        assert ("bf16_finish=0.5 has no effect" in text) == said
        assert "FP8" not in text


def test_steps_that_nobody_tells_of_are_in_fp8():
    model = with_lora(make_model("llama"))
    lemo = apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    lemo.begin_step(3, 4)
    assert not in_fp8(model)
    lemo.begin_step(4)
    assert in_fp8(model)


def test_a_run_that_ends_after_lemo_leaves_nothing_in_fp8():
    model = with_lora(make_model("llama"))
    lemo = apply_lemo(model, LeMoConfig(**HALF, fp8=True, dense_finish=0.5))
    lemo.begin_step(3, 4)
    remove_lemo(model)
    lemo.end_run()
    assert not in_fp8(model)


def test_refusals():
    with pytest.raises(ValueError, match="no decoder layer has a frozen"):
        apply_lemo(make_model("llama"), LeMoConfig(**HALF, fp8=True))
    with pytest.raises(ValueError, match="FSDP2"):
        check_trainer(None, None, object(), LeMoConfig(fp8=True))
    with pytest.raises(ValueError, match="fp8 must be one of"):
        LeMoConfig(fp8="yes")
    for share in (1.1, -0.1, None):
        with pytest.raises(ValueError, match=r"bf16_finish must lie in \[0, 1\], got"):
            LeMoConfig(bf16_finish=share)


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 1e-9}, {"use_dora": True}, {"dtype": torch.bfloat16}],
    ids=["dropout", "DoRA", "adapters in fp32"],
)
def test_adapters_that_must_be_called(options):
    """The frozen product below them is in FP8 too."""
    model = make_model("llama").to(options.pop("dtype", torch.float32))
    model = with_lora(model, **options)
    if model.dtype == torch.bfloat16:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    apply_lemo(model, LeMoConfig(**HALF))
    loss, gradients = loss_and_gradients(model, **batch())
    remove_lemo(model)
    apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    found, others = loss_and_gradients(model, **batch())
    assert copies_of(model) and all(copies_of(model).values())
    assert found != loss and found == pytest.approx(loss, rel=0.02)
    assert all(relative_error(others[name], gradients[name]) < 0.5 for name in gradients)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_its_adapter_is_in_fp8_as_with_it():
    """Which DPO compares: a new adapter changes nothing."""
    model = with_lora(make_model("llama"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    apply_lemo(model, LeMoConfig(**HALF, fp8=True))
    loss, _ = loss_and_gradients(model, **batch())
    with model.disable_adapter():
        assert model(**batch()).loss.item() == loss
