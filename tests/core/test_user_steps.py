"""Steps that a user takes without telling LeMo: chance, the finish, and labels they change."""

from dataclasses import replace

import pytest
from support.models import batch, make_model
from support.trainers import FULL, assert_same_weights, dataset, losses, make_trainer
from transformers import Trainer, TrainerCallback

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo
from lemo_hf.patch import lemo_of

CHANCE = LeMoConfig(retention=0.25, block_size=8, chunk_size=8, policy="chunks")


def kept(lemo):
    return tuple(lemo.passes.tally.kept_blocks[0, "attention"][0].tolist())


def test_chance_draws_anew_in_each_pass_of_a_users_loop():
    """Unless steps are told: then the step alone decides, whatever the number of its passes."""
    model = make_model("llama")
    lemo = apply_lemo(model, CHANCE)
    seen = []
    for _ in range(8):
        model(**batch(tokens=128)).loss.backward()
        seen.append(kept(lemo))
    assert len(set(seen)) > 3
    told = []
    for step in (5, 5, 6):
        lemo.begin_step(step)
        model(**batch(tokens=128)).loss.backward()
        told.append(kept(lemo))
    assert told[0] == told[1] != told[2]


class Steps(LeMoTrainer):
    """With a `training_step` that is not Trainer's."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_users_training_step_has_chance_and_a_finish(tmp_path):
    config = replace(CHANCE, dense_finish=0.5)
    ours, theirs = (
        make_trainer(tmp_path, config, cls=cls, max_steps=4, logging_steps=1)
        for cls in (LeMoTrainer, Steps)
    )
    assert losses(theirs) == losses(ours)
    share = [log["lemo/attention_retention"] for log in theirs.state.log_history if "loss" in log]
    assert share[:2] == [0.25, 0.25] and share[2:] == [1.0, 1.0]
    assert_same_weights(theirs, ours, rtol=0, atol=0)


def test_a_loss_after_the_run_is_not_in_its_finish(tmp_path):
    config = replace(CHANCE, dense_finish=0.5)
    trainer = make_trainer(tmp_path, config, data=dataset(tokens=128))
    trainer.train()
    assert all(kept(trainer.lemo))
    trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    assert sum(kept(trainer.lemo)) == 4  # a quarter of 16 blocks


def masking(base, also):
    class Masks(base):
        """Leaves the first labels of each row out, in place."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs["labels"][:, :40] = -100
            if also:  # another pass of the step, whose labels LeMo strikes
                model(**inputs)
            loss = model(**inputs).loss
            return (loss, None) if return_outputs else loss

    return Masks


@pytest.mark.parametrize("also", [False, True])
def test_labels_that_a_users_loss_changes_in_place_are_changed(tmp_path, also):
    full = losses(make_trainer(tmp_path, FULL, cls=masking(LeMoTrainer, also)))
    plain = losses(make_trainer(tmp_path, None, cls=masking(Trainer, also)))
    assert full == pytest.approx(plain, rel=1e-5)
    whole = losses(make_trainer(tmp_path, None, cls=Trainer))
    assert full != pytest.approx(whole, rel=1e-3)


def test_blocks_are_chosen_by_the_labels_that_a_user_leaves(tmp_path):
    """Three of eight blocks have labels and stay, with the one that predicts the first of them."""
    seen = []

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(kept(lemo_of(model)))

    config = LeMoConfig(retention=0.25, block_size=8, policy="recent")
    for cls in (LeMoTrainer, masking(LeMoTrainer, False)):
        make_trainer(tmp_path, config, cls=cls, callbacks=[See()], max_steps=1).train()
    whole, masked = seen
    assert sum(whole) == 2 and all(masked[4:]) and sum(masked) == 5
