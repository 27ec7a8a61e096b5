"""The reported loss is Trainer's, and the host asks the GPU nothing for it."""

import copy
import functools
import math
import pickle

import pytest
import torch
from support.trainers import FULL, losses, make_trainer
from transformers import Trainer

from lemo_hf import LeMoTrainer
from lemo_hf.overrides import overrides
from lemo_hf.reported_loss import FiniteLoss, finite_loss

ODD = {1: math.nan, 2: math.inf, 5: -math.inf}


class Spoils:
    """Makes some losses NaN or infinite, but not their gradients."""

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        value = ODD.get(self.state.global_step)
        return loss if value is None else loss + (value - loss).detach()


class Looks(Spoils):
    """With a `training_step` that sees each loss."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        assert type(loss) is torch.Tensor
        vars(self).setdefault("seen", []).append(loss.item())
        return loss


@pytest.fixture
def made(monkeypatch):
    """Finite losses that were made."""
    found = []

    def make(loss, instead):
        found.append(finite_loss(loss, instead))
        return found[-1]

    monkeypatch.setattr("lemo_hf.trainer.finite_loss", make)
    return found


@pytest.mark.oldest
@pytest.mark.parametrize("mixin", [Spoils, Looks])
@pytest.mark.parametrize("options", [{"logging_steps": 1}, {"logging_steps": 3}])
@pytest.mark.parametrize("filtered", [True, False])
def test_it_is_that_of_trainer(mixin, options, filtered, made, tmp_path):
    options = {**options, "max_steps": 7, "logging_nan_inf_filter": filtered}
    options |= {"gradient_accumulation_steps": 2, "logging_first_step": True}
    kinds = [type("Spoiled", (mixin, kind), {}) for kind in (Trainer, LeMoTrainer)]
    trainers = [make_trainer(tmp_path, FULL, cls=kind, **options) for kind in kinds]
    stock, found = map(losses, trainers)
    assert found == pytest.approx(stock, rel=1e-5, nan_ok=True)
    assert all(map(math.isfinite, found)) == filtered
    assert len(made) == (14 if filtered and mixin is Spoils else 0)
    if mixin is Looks:
        assert trainers[1].seen == pytest.approx(trainers[0].seen, rel=1e-5, nan_ok=True)
        assert sum(map(math.isfinite, trainers[1].seen)) == 2 * (7 - len(ODD))


def test_nobody_needs_the_numbers_to_know_that_it_is_finite():
    """Tensors on the device "meta" have none."""
    empty = torch.zeros((), device="meta")
    loss = finite_loss(empty, empty)
    assert not torch.isnan(loss) and not loss.isinf()
    total = empty.clone()
    total += loss
    assert type(total) is torch.Tensor and type(loss / 2) is torch.Tensor
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.isnan(loss / 2))


def test_in_all_else_it_is_a_plain_tensor(tmp_path):
    loss = finite_loss(torch.tensor(1.5), torch.tensor(3.0))
    assert f"{loss:.3f}" == "1.500" and f"{loss}" == "1.5" and repr(loss) == "tensor(1.5000)"
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.cpu(), loss.float()):
        assert type(other) is torch.Tensor and other == 1.5
    torch.save(loss, tmp_path / "loss.pt")
    assert torch.load(tmp_path / "loss.pt") == 1.5
    assert not torch.isnan(input=loss)
    same = loss
    same += math.nan
    assert torch.isnan(same) and torch.isnan(loss) and loss.isnan()
    loss = finite_loss(torch.tensor(1.5), torch.tensor(3.0))
    torch.add(loss, math.inf, out=loss)
    assert torch.isinf(loss)


def test_what_takes_its_place_is_not_rounded():
    loss = finite_loss(torch.tensor(math.nan, dtype=torch.bfloat16), torch.tensor(3.3333))
    assert loss.item() == pytest.approx(3.3333)


def test_values():
    for value, expected in ((1.5, 1.5), (math.nan, 3.0), (math.inf, 3.0), (-math.inf, 3.0)):
        loss = finite_loss(torch.tensor(value), torch.tensor(3.0))
        assert isinstance(loss, FiniteLoss) and loss.item() == expected


@pytest.mark.oldest
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("config", [None, FULL])
def test_rows_are_copied_without_a_wait_where_they_are_pinned(config, pinned, asked, tmp_path):
    class Pins(LeMoTrainer):
        def __init__(self, args, **others):
            args.dataloader_pin_memory = pinned  # TrainingArguments refuse it on a CPU
            super().__init__(args=args, **others)

    own = {"accelerator_config": {"non_blocking": asked}}
    trainer = make_trainer(tmp_path, config, cls=Pins, **own)
    pins = trainer.get_train_dataloader()
    assert pins._non_blocking == (asked or (pinned and config is not None))
    trainer.create_accelerator_and_postprocess()  # as a search of hyperparameters does
    assert trainer.get_train_dataloader()._non_blocking == pins._non_blocking


@pytest.mark.parametrize("where", ["class", "subclass", "trainer"])
@pytest.mark.parametrize("named", [False, True])
def test_a_wrapper_of_the_step_sees_it_as_it_is(where, named, monkeypatch, tmp_path):
    own, seen = LeMoTrainer.training_step, []

    def step(*args, **kwargs):
        seen.append(own(*args, **kwargs))
        return seen[-1]

    kind = LeMoTrainer
    step = functools.wraps(own)(step) if named and where != "class" else step
    if where == "class":
        monkeypatch.setattr(LeMoTrainer, "training_step", step, raising=False)
    elif where == "subclass":
        kind = type("Wrapped", (LeMoTrainer,), {"training_step": step})
    trainer = make_trainer(tmp_path, FULL, cls=kind)
    if where == "trainer":
        trainer.training_step = functools.partial(step, trainer)
    trainer.train()
    assert {type(loss) for loss in seen} == {torch.Tensor}


def test_whose_a_method_is(tmp_path):
    trainer = make_trainer(tmp_path, FULL)
    assert not overrides(trainer, "training_step") and not overrides(trainer, "compute_loss")
    own = functools.wraps(LeMoTrainer.compute_loss)(lambda *args, **kwargs: None)
    for made in (own, property(own)):
        kind = type("Own", (LeMoTrainer,), {"compute_loss": made})
        assert overrides(kind.__new__(kind), "compute_loss")
        assert not overrides(kind.__new__(kind), "training_step")
    trainer.compute_loss = own
    assert overrides(trainer, "compute_loss")


@pytest.mark.parametrize("trained", [False, True])
def test_a_step_outside_a_run_returns_its_loss(trained, tmp_path):
    trainer = make_trainer(tmp_path, FULL)
    if trained:
        trainer.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(trainer.model, inputs)
    assert type(loss) is torch.Tensor and math.isfinite(loss)
