"""The folder of a run of `lemo train`: used again, started over, resumed, whole at any end."""

import json
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from support.train_run import MODEL

from lemo_hf.cli.train_folder import clear


def small(config, *more):
    """Checkpoints 2 and 4, and no more steps."""
    steps = ("--training.save_strategy", "steps", "--training.save_steps", 2)
    return ("train", "--config", config, "--json", *steps, "--training.max_steps", 4, *more)


def adapter_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_used_folder_is_refused_or_started_over(lemo, tmp_path, config):
    out = tmp_path / "out"
    code, _, err = lemo(*small(config))
    assert code == 0, err
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = ("--training.seed", 5)
    code, printed, err = lemo(*small(config, *other))
    assert code == 2 and not printed
    assert f"{out} holds a run already (adapter_model.safetensors): go on with --resume" in err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, err = lemo(*small(config, *other, "--overwrite", "--resume"))
    assert code == 2 and "give one of them" in err
    code, _, err = lemo(*small(config, "--overwrite", "--training.learning_rate", -1))
    assert code == 2 and "Invalid learning rate: -1" in err
    assert before == {path: path.read_bytes() for path in before}  # nothing is lost by a mistake
    (out / "notes.txt").write_text("mine")
    code, _, err = lemo(*small(config, *other, "--overwrite", "--training.save_steps", 3))
    assert code == 0, err
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert (out / "notes.txt").read_text() == "mine"
    code, _, err = lemo(*small(config, *other, "--output", tmp_path / "fresh"))
    assert code == 0 and adapter_of(out) == adapter_of(tmp_path / "fresh"), err
    code, _, err = lemo(*small(config, "--overwrite", "--output", MODEL))
    assert code == 2 and f"--overwrite would remove the model {MODEL}" in err
    assert (Path(MODEL) / "model.safetensors").is_file()


def test_a_whole_model_is_removed_with_its_config(lemo, tmp_path, config):
    out = tmp_path / "out"
    code, _, err = lemo("train", "--config", config, "--full")
    assert code == 0 and (out / "config.json").is_file(), err
    code, _, err = lemo("train", "--config", config, "--overwrite")
    assert code == 0 and (out / "adapter_config.json").is_file(), err
    assert not any((out / name).exists() for name in ("config.json", "model.safetensors"))
    (out / "config.json").write_text("{}")  # not of this run
    clear(str(out))
    assert (out / "config.json").is_file() and not (out / "adapter_config.json").exists()


def test_resuming_takes_the_newest_whole_checkpoint(lemo, tmp_path, config, caplog):
    out = tmp_path / "out"
    code, printed, err = lemo(*small(config))
    assert code == 0, err
    whole = adapter_of(out), json.loads(printed)["losses"]
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    (out / "all_results.json").write_text('{"tr')
    code, printed, err = lemo(*small(config, "--resume"))
    assert code == 0, err
    assert "checkpoint-4 is incomplete and was skipped: it has no trainer_state.json" in caplog.text
    assert (adapter_of(out), json.loads(printed)["losses"]) == whole
    assert "train_loss" in json.loads((out / "all_results.json").read_text())
    for number in (2, 4):
        (out / f"checkpoint-{number}" / "optimizer.pt").write_bytes(b"PK")
    code, _, err = lemo(*small(config, "--resume"))
    assert code == 2 and "has no whole checkpoint (checkpoint-4: " in err
    assert "start over with --overwrite" in err


def test_a_run_that_ended_is_resumed_without_a_further_step(lemo, tmp_path, config):
    """As one killed after its last checkpoint, with an evaluation and a report still to do."""
    out = tmp_path / "out"
    code, printed, err = lemo(*small(config))
    assert code == 0, err
    whole = adapter_of(out), json.loads(printed)["losses"]
    (out / "adapter_model.safetensors").unlink()
    heldout = ("--data.eval_dataset", tmp_path / "book.txt", "--data.max_eval_rows", 1)
    code, printed, err = lemo(*small(config, "--resume", "--report", *heldout))
    assert code == 0, err
    found = json.loads(printed)
    assert (adapter_of(out), found["losses"]) == whole and found["steps"] == 4
    assert found["metrics"]["eval_loss"] > 0 and (out / "report.html").is_file()
    code, printed, err = lemo(*small(config, "--resume", "--training.max_steps", 5))
    assert code == 0 and json.loads(printed)["steps"] == 5, err


def test_a_run_is_not_resumed_with_other_parameters(lemo, tmp_path, config, caplog):
    code, _, err = lemo(*small(config))
    assert code == 0, err
    for flags, said in ((("--lora.r", 3), "'r': 3"), (("--full",), "lora=None")):
        code, _, err = lemo(*small(config, "--resume", "--training.max_steps", 6, *flags))
        assert code == 2 and "was made with lora={" in err and said in err, err
    code, _, err = lemo(*small(config, "--resume", "--training.max_steps", 5, "--dense"))
    assert code == 0 and "was made with LeMo, and this run goes on without it" in caplog.text, err
    code, _, err = lemo(*small(config, "--dense", "--retention", 0.5))
    assert code == 2 and "--dense trains without LeMo, and --retention sets it" in err


def test_settings_lie_beside_the_weights_they_made(lemo, tmp_path, config, monkeypatch):
    out = tmp_path / "out"
    code, _, err = lemo(*small(config))
    assert code == 0, err
    settings = (out / "lemo_train.yaml").read_text()
    for number in (2, 4):  # which `lemo merge` reads there
        assert (out / f"checkpoint-{number}" / "lemo_train.yaml").read_text() == settings
    before = adapter_of(out)

    class Killed(BaseException):
        """Nobody expects it."""

    def killed(*_, **__):
        raise Killed

    longer = small(config, "--resume", "--training.max_steps", 6)
    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", killed)
        with pytest.raises(Killed):  # while it writes a checkpoint
            lemo(*longer)
    assert (adapter_of(out), (out / "lemo_train.yaml").read_text()) == (before, settings)
    code, _, err = lemo(*longer)
    assert code == 0 and adapter_of(out) != before, err
    assert yaml.safe_load((out / "lemo_train.yaml").read_text())["training"]["max_steps"] == 6
