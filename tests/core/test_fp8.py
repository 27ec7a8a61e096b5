"""`fp8`: products with frozen weights alone, near those of the model, and gone when LeMo is."""

from contextlib import nullcontext

import pytest
import torch
from support.fp8_cases import HALF, copies_of, few_rows, in_fp8  # noqa: F401
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from support.trainers import losses, make_trainer
from torch import nn
from transformers import Trainer, TrainerCallback

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core import fp8, fp8_switch
from lemo_hf.core.checks import check_trainer
from lemo_hf.core.lora import linear_of
from lemo_hf.describe import describe_run
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.patch import lemo_of


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
