"""DDP: two processes train as one does with the same rows a step, and survive the loss of one."""

import os
import time

import pytest
import torch
from support.ddp_cases import ALL, BROKEN, CASES, RESUMED, RESUMES
from support.exported import assert_merges
from support.processes import launch, start
from support.training_cases import (
    assert_same,
    make_trainer,
    outcome,
    read,
    rows,
    train,
)

TRAIN = """
import os
from pathlib import Path
from support.ddp_cases import ALL, RESUMED, RESUMES
from support.training_cases import make_trainer, outcome, train, write
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
kept = set()
for name, case in ALL.items():
    trainer = make_trainer(folder / name, **case)
    trainer.train()
    kept.add(type(trainer.model_wrapped).__name__)
    write(folder, name, outcome(trainer), process)
assert kept == {"DistributedDataParallel"}, kept
alone = {**ALL["full-answers"], "average_tokens_across_devices": False}
write(folder, "alone", train(folder / "alone", **alone), process)
for name, case in RESUMED.items():
    trainer = make_trainer(folder / f"two-{name}", **case)
    trainer.train()
    trainer.save_model(folder / f"two-{name}" / "final")
    write(folder, name, outcome(trainer), process)
    if not RESUMES:
        continue
    first = folder / f"one-{name}" / "checkpoint-3"
    write(folder, f"resumed-{name}", train(folder / f"r-{name}", str(first), **case), process)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with what two processes made of all cases."""
    folder = tmp_path_factory.mktemp("ddp")
    for name, case in RESUMED.items():
        train(folder / f"one-{name}", **case)
    launch(TRAIN, folder, [2])
    return folder


def test_the_two_processes_keep_different_counts(tmp_path):
    """What the cases are about; without it their equality would say little."""
    for name in ("padded", "thresholds", "answers"):
        trainer = make_trainer(tmp_path, lora=False, **CASES[name])
        shares = []
        for process in range(2):
            part = rows(CASES[name].get("data", "whole"))[2 * process : 2 * process + 2]
            with trainer.lemo.training():
                trainer.model.train()(**trainer.data_collator(part))
            shares.append(
                sum(map(int, [s.sum() for s in trainer.lemo.passes.tally.kept_blocks.values()]))
            )
        assert shares[0] != shares[1], name


@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one(two, tmp_path, name):
    assert_same(read(two, name), train(tmp_path, **ALL[name]))


def test_losses_are_means_over_the_labels_of_all_processes(two):
    """Each process by itself would give a label the more weight, the fewer it has."""
    together, alone = read(two, "full-answers"), read(two, "alone")
    assert max(abs(a - b) for a, b in zip(together[0], alone[0], strict=True)) > 0.01


@pytest.mark.parametrize("name", RESUMED)
def test_another_number_of_processes_resumes(two, tmp_path, name):
    case = RESUMED[name]
    uninterrupted = train(tmp_path / "whole", **case)
    assert_same(read(two, name), uninterrupted)
    if RESUMES:
        assert_same(read(two, f"resumed-{name}"), uninterrupted)
    second = two / f"two-{name}" / "checkpoint-3"
    assert_same(train(tmp_path / "resumed", str(second), **case), uninterrupted)


def test_an_adapter_merges_on_one_process(two, tmp_path, lemo):
    final = two / "two-saved-lora" / "final"
    assert_merges(lemo, final, read(two, "saved-lora")[1], tmp_path)


LOST = """
import os, signal, time
from pathlib import Path
from support.ddp_cases import BROKEN
from support.training_cases import make_trainer
from transformers import TrainerCallback
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
class Break(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if process == 1 and state.global_step == 2:
            (folder / "broken").write_text(str(time.time()))
            HOW
trainer = make_trainer(folder / "run", **BROKEN)
trainer.add_callback(Break())
trainer.train()
"""


@pytest.mark.parametrize(
    "how, said",
    [
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)",
            ["rank      : 1", "Signal 9 (SIGKILL)"],
            id="killed",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            'raise RuntimeError("this row is broken")',
            ["rank      : 1", "this row is broken"],
            id="raised",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_lost_process_ends_the_job_which_resumes(tmp_path, how, said):
    ended = start(LOST.replace("HOW", how), tmp_path, 2)
    seconds = time.time() - float((tmp_path / "broken").read_text())
    assert ended.returncode != 0 and seconds < 60  # no waiting for a collective to time out
    for words in said:
        assert words in ended.stderr
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-1", "checkpoint-2"]
    trainer = make_trainer(tmp_path / "run", **BROKEN)
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), train(tmp_path / "whole", **BROKEN))
    assert torch.tensor(outcome(trainer)[0]).isfinite().all()
