"""`LeMoCallback` under Trainers that know nothing of LeMo, alone and in several processes."""

import pytest
from support.callback_cases import CASES, with_callback
from support.models import make_model
from support.processes import launch
from support.trainers import FULL, SPARSE, assert_same_weights, losses, make_trainer
from support.training_cases import assert_same, read, train
from transformers import Trainer

from lemo_hf import LeMoConfig
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.patch import lemo_of


@pytest.mark.oldest
@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
@pytest.mark.parametrize("config", [FULL, SPARSE])
def test_training_is_lemo_trainers(tmp_path, config, arguments):
    theirs = with_callback(tmp_path, config, **arguments)
    ours = make_trainer(tmp_path, config, **arguments)
    assert losses(theirs) == losses(ours)
    assert_same_weights(theirs, ours, rtol=0, atol=0)


@pytest.mark.oldest
def test_the_model_is_stock_again_after_training(tmp_path):
    trainer = with_callback(tmp_path, SPARSE)
    classes = [type(module) for module in make_trainer(tmp_path, None).model.modules()]
    assert [type(module) for module in trainer.model.modules()] != classes
    trainer.train()
    assert [type(module) for module in trainer.model.modules()] == classes
    assert lemo_of(trainer.model) is None
    again = losses(trainer)  # and LeMo comes back for the next training
    assert all("lemo/mlp_retention" in log for log in trainer.state.log_history if "loss" in log)
    assert again[-1] < 5


@pytest.mark.oldest
@pytest.mark.parametrize("late", [False, True])
def test_model_init_and_callbacks_that_come_late(tmp_path, late):
    """Then only ``on_train_begin`` sees the model."""
    own = {"model": make_model("llama")} if late else {"model_init": lambda: make_model("llama")}
    expected = losses(make_trainer(tmp_path, SPARSE, **own))
    own = {"model": make_model("llama")} if late else own
    if late:
        trainer = make_trainer(tmp_path, None, cls=Trainer, **own)
        trainer.add_callback(LeMoCallback(SPARSE))
    else:
        trainer = with_callback(tmp_path, SPARSE, **own)
    assert losses(trainer) == expected


@pytest.mark.oldest
def test_figures_and_files(tmp_path, capsys):
    trainer = with_callback(tmp_path, SPARSE, save_strategy="steps", save_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["lemo/attention_retention"] for log in logs] == [0.5] * 4
    assert all(log["lemo/kept_tokens_per_second"] > 0 for log in logs)
    assert "LeMo: 4 of 4 layers" in capsys.readouterr().out
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert LeMoConfig.from_pretrained(folder) == SPARSE


def test_what_a_callback_cannot_reach_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1.*LeMoTrainer"):
        with_callback(tmp_path, SPARSE, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"sequence_parallel_size=2.*LeMoTrainer"):
        with_callback(tmp_path, LeMoConfig(sequence_parallel_size=2))
    with pytest.raises(ValueError, match="lemo_config must be a LeMoConfig, got 0.5"):
        LeMoCallback(0.5)
    everything = LeMoConfig(retention=0.5, block_size=8, policy="random", supervise="all")
    ours = make_trainer(tmp_path, everything, label_smoothing_factor=0.1)
    theirs = with_callback(tmp_path, everything, label_smoothing_factor=0.1)
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-5)


TRAIN = """
import os
from pathlib import Path
from support import training_cases
from support.callback_cases import CASES, WithCallback
from support.training_cases import make_trainer, outcome, write
from lemo_hf.patch import lemo_of

folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
training_cases.InOrder = WithCallback
for late in (False, True):
    WithCallback.late = late
    for name, case in CASES.items():
        for fsdp in ({}, {"fsdp": True, "fsdp_config": {"version": 2}}):
            trainer = make_trainer(folder / name, **case, **fsdp)
            trainer.train()
            assert trainer.accelerator.is_fsdp2 == bool(fsdp)
            assert (lemo_of(trainer.model) is not None) == bool(fsdp)
            write(folder, f"{name}-{late}-{bool(fsdp)}", outcome(trainer), process)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("callback")
    launch(TRAIN, folder, [2])
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two, tmp_path, name, late, fsdp):
    assert_same(read(two, f"{name}-{late}-{fsdp}"), train(tmp_path, **CASES[name]))
