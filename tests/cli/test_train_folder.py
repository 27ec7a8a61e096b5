"""The folder of a run of `lemo train`: used again, started over, resumed, whole at any end."""

import json
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from support.train_run import MODEL
from transformers import TrainingArguments

from lemo_hf.cli.train_folder import clear, starting_point


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
    assert code == 2 and f"--overwrite would remove {MODEL}, which this run" in err
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


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def used(lemo, tmp_path, config):
    """A folder with a run of two checkpoints, and what lies in it."""
    code, _, err = lemo(*small(config))
    assert code == 0, err
    return tmp_path / "out", files_of(tmp_path / "out")


def test_what_a_run_reads_is_not_overwritten(lemo, tmp_path, config, used):
    out, before = used
    (tmp_path / "link").symlink_to(out)
    (out / "held.txt").write_text("words " * 4000)
    for path in (out / "held.txt", tmp_path / "link" / "held.txt"):
        code, _, err = lemo(*small(config, "--overwrite", "--data.eval_dataset", path))
        assert code == 2 and f"--overwrite would remove {path}, which this run reads" in err
    for path in (out / "checkpoint-2", out / "checkpoint-2" / "model"):  # a base model
        path.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="would remove"):
            starting_point(_arguments(out), False, True, [MODEL, str(path)])
    assert all(path.read_bytes() == content for path, content in before.items())


def _arguments(out, **more):
    return TrainingArguments(output_dir=str(out), use_cpu=True, report_to="none", **more)


def test_a_checkpoint_of_another_run_needs_a_fresh_folder(lemo, tmp_path, config, used):
    out, before = used
    given = ("--training.resume_from_checkpoint", out / "checkpoint-2")
    other = ("--output", tmp_path / "other")
    for flag in ("--resume", "--overwrite"):
        code, _, err = lemo(*small(config, *given, flag))
        assert code == 2 and flag in err and "names another start" in err
    code, _, err = lemo(*small(config, *given, *other))
    assert code == 0, err
    theirs = files_of(tmp_path / "other")
    code, _, err = lemo(*small(config, *given, *other))
    assert code == 2 and "other holds a run already" in err
    assert files_of(tmp_path / "other") == theirs and files_of(out) == before
    code, _, err = lemo(*small(config, *given))  # of this run
    assert code == 0, err


@pytest.mark.parametrize(
    "wrong",
    [
        ("--training.lr_scheduler_type", "cosine_with_min_lr"),
        ("--training.max_grad_norm", "1.0", "--lemo.block_size", 4096),
    ],
)
def test_a_run_is_removed_at_the_first_step_of_the_next(lemo, config, used, wrong, caplog):
    out, before = used
    code, _, err = lemo(*small(config, "--overwrite", "--report", *wrong))
    assert code == 2, err
    assert {path: content for path, content in files_of(out).items() if path.name != "_lock"} == {
        path: content for path, content in before.items() if path.name != "_lock"
    }
    assert "is there again" in caplog.text
    code, _, err = lemo(*small(config, "--overwrite", "--training.save_steps", 3))
    assert code == 0 and not (out / "checkpoint-2").exists(), err
    assert not list(out.glob("_re*"))


def test_a_run_whose_replacement_was_killed_is_put_back(lemo, config, used, caplog):
    out, before = used
    aside = out / "_replaced"
    aside.mkdir()
    for name in ("lemo_train.yaml", "checkpoint-4"):  # the rest was not yet moved
        (out / name).rename(aside / name)
    (out / "lemo_train.yaml").write_text("of: the new run")
    (out / "_removed").mkdir()
    code, _, err = lemo(*small(config))
    assert code == 2 and "holds a run already" in err
    assert files_of(out) == before and not list(out.glob("_re*"))
    assert "was ended before its first step: that run is there again" in caplog.text


def test_an_empty_output_is_refused(lemo, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = lemo(*small(config, "--output", ""))
    assert code == 2 and "training.output_dir is missing: --output DIR" in err
