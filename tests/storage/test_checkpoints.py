"""Which checkpoints were written to their end: those that Trainer wrote, damaged in every file."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
from support.trainers import losses, make_trainer

from lemo_hf import LeMoConfig
from lemo_hf.storage.checkpoints import checkpoints, damage, newest_whole_checkpoint

pytestmark = pytest.mark.oldest

LEMO = LeMoConfig(retention=0.5, block_size=8, policy="random")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints 2 and 4, and the losses it had."""
    trainer = make_trainer(
        tmp_path_factory.mktemp("run") / "out",
        LEMO,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    return trainer.args, losses(trainer)


def test_whole_checkpoints_and_every_file_cut_short_or_gone(run, tmp_path):
    args, _ = run
    newest, older = checkpoints(args.output_dir)
    assert (newest.name, older.name) == ("checkpoint-4", "checkpoint-2")
    assert damage(newest, args) is None
    seen = set()
    for path in sorted(newest.iterdir()):
        copy = tmp_path / path.name / newest.name
        shutil.copytree(newest, copy)
        data = path.read_bytes()
        (copy / path.name).write_bytes(data[: len(data) // 2])
        if path.suffix in (".json", ".safetensors", ".pt", ".pth", ".bin"):
            assert damage(copy, args).startswith(f"{path.name} is damaged"), path.name
            seen.add(path.suffix)
        (copy / path.name).unlink()
        needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
        if path.name in needed or path.suffix == ".safetensors":
            assert damage(copy, args).startswith("it has no"), path.name
    assert seen == {".json", ".safetensors", ".pt", ".pth", ".bin"}


def test_a_shard_that_is_missing(run, tmp_path):
    args, _ = run
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoints(args.output_dir)[0], copy)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert damage(copy, args) == "it has no model-00001-of-00002.safetensors"


def test_resuming_takes_the_newest_whole_checkpoint_and_says_so(run, tmp_path, caplog):
    args, expected = run
    shutil.copytree(args.output_dir, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "out" / "checkpoint-9").mkdir()
    (tmp_path / "out" / "checkpoint-notes").mkdir()
    trainer = make_trainer(tmp_path / "out", LEMO, max_steps=4, save_strategy="no")
    with caplog.at_level(logging.WARNING):
        assert newest_whole_checkpoint(trainer.args) == str(tmp_path / "out" / "checkpoint-2")
    assert "checkpoint-9 is incomplete and was skipped: it has no trainer_state.json" in caplog.text
    assert "checkpoint-4 is incomplete and was skipped" in caplog.text
    assert losses(trainer, resume_from_checkpoint=True) == expected


def test_resuming_without_a_whole_checkpoint_says_what_it_does(tmp_path, caplog):
    """Trainer takes the newest; LeMo says what that lacks, and how the settings differ."""
    first = make_trainer(
        tmp_path, LEMO, max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True
    )
    first.train()
    trainer = make_trainer(tmp_path, replace(LEMO, retention=0.9), max_steps=3, save_strategy="no")
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert f"Resuming the newest, {tmp_path / 'checkpoint-2'}: it has no optimizer" in caplog.text
    assert "retention=0.9 (was " in caplog.text and "skipped" not in caplog.text
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 3]


def test_without_a_checkpoint_trainer_says_so(tmp_path):
    (tmp_path / "out").mkdir()
    trainer = make_trainer(tmp_path / "out", LEMO, max_steps=1)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)
