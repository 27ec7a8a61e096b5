"""The time of training by which its speed is told, by a clock that nothing but the test moves."""

import pytest
from support.trainers import SPARSE, dataset, make_trainer
from transformers import Trainer, TrainerCallback

from lemo_hf.integrations.callback import LeMoCallback


def test_waiting_before_training_is_no_training_time(tmp_path, monkeypatch):
    """Kept tokens per second count from the start of training, not from the Trainer's making."""
    clock = [100.0]
    monkeypatch.setattr("lemo_hf.stopwatch.time.perf_counter", lambda: clock[0])
    trainer = make_trainer(tmp_path, SPARSE, max_steps=1)
    clock[0] += 900
    stock_step = trainer.training_step

    def step(*args, **kwargs):
        clock[0] += 2
        return stock_step(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", step)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["lemo/kept_tokens_per_second"] == pytest.approx(2 * 32 / 2)


@pytest.mark.parametrize("by_callback", [False, True])
@pytest.mark.parametrize("when", ["steps", "epoch"])
def test_evaluation_and_saving_are_no_training_time(tmp_path, monkeypatch, by_callback, when):
    """By a clock that only steps, evaluations and checkpoints move, each by another time."""
    clock = [100.0]
    monkeypatch.setattr("lemo_hf.stopwatch.time.perf_counter", lambda: clock[0])

    def taking(seconds, cls, name):
        stock = getattr(cls, name)

        def slow(*args, **kwargs):
            clock[0] += seconds
            return stock(*args, **kwargs)

        monkeypatch.setattr(cls, name, slow)

    taking(2, Trainer, "training_step")
    taking(100, Trainer, "evaluation_loop")
    taking(10_000, Trainer, "_save_optimizer_and_scheduler")
    how = {"cls": Trainer, "callbacks": [LeMoCallback(SPARSE)]} if by_callback else {}
    data, several = dataset(4), {"a": dataset(2), "b": dataset(2)}
    trainer = make_trainer(
        tmp_path, None if by_callback else SPARSE, data=data, eval_dataset=several, **how,
        max_steps=6, eval_strategy=when, eval_steps=2, save_strategy=when, save_steps=3,
        eval_on_start=True,
    )  # fmt: skip
    trainer.train()
    assert clock[0] > 20_000
    speeds = [x["lemo/kept_tokens_per_second"] for x in trainer.state.log_history if "loss" in x]
    assert speeds == [pytest.approx(2 * 32 / 2)] * 6


@pytest.mark.parametrize("what", ["evaluate", "predict"])
@pytest.mark.parametrize("by", ["trainer", "callback", "late callback"])
def test_an_evaluation_by_another_callback_leaves_out_no_step(tmp_path, monkeypatch, by, what):
    """It may come before LeMoCallback knows that the step has ended, which then counts the first
    batch of the evaluation."""
    clock = [100.0]
    monkeypatch.setattr("lemo_hf.stopwatch.time.perf_counter", lambda: clock[0])

    class ByHand(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % 2:
                getattr(trainer, what)(dataset(6))

    def taking(seconds, name):
        stock = getattr(Trainer, name)

        def slow(*args, **kwargs):
            clock[0] += seconds
            return stock(*args, **kwargs)

        monkeypatch.setattr(Trainer, name, slow)

    taking(2, "training_step")
    taking(100, "prediction_step")
    how = {"callbacks": [ByHand()]}
    if by != "trainer":
        ours = [LeMoCallback(SPARSE)]
        how = {"callbacks": [ByHand(), *ours] if by == "late callback" else [*ours, ByHand()]}
        how["cls"] = Trainer
    trainer = make_trainer(
        tmp_path, SPARSE if by == "trainer" else None, **how,
        data=dataset(4), max_steps=4, logging_steps=2, per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train()
    assert clock[0] == 100 + 4 * 2 + 2 * 3 * 100
    speeds = [x["lemo/kept_tokens_per_second"] for x in trainer.state.log_history if "loss" in x]
    assert speeds == [pytest.approx(2 * 2 * 32 / (104 if by == "late callback" else 4))] * 2
