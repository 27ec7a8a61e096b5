"""Mistakes are found before a model loads, all of them at once, with what may have been meant."""

import json

import pytest
import yaml
from support.paths import DEMO

MODEL = DEMO / "model"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A run that would train, in flags; no weights are read."""
    monkeypatch.chdir(tmp_path)

    def refused(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lemo_hf.cli.train_model.load_weights", refused)
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": "one two three", "body": "four"}))
    values = {
        "--model": MODEL,
        "--dataset": "books.jsonl",
        "--tokens": 8,
        "--output": "out",
        "--lora.r": 2,
        "--lora.target_modules": "[q_proj, v_proj]",
        "--training.use_cpu": "true",
    }
    return lambda **more: ("train", *(w for pair in ({**values, **more}).items() for w in pair))


def test_all_that_is_missing_is_told_at_once(lemo, asked):
    code, _, err = lemo("train")
    assert code == 2 and "5 mistakes:" in err
    for line in (
        "- flags: model.name is missing: --model NAME.",
        "- flags: data.dataset is missing: --dataset NAME.",
        "- flags: data.tokens is missing: --tokens NUMBER, or --memory-gib",
        "- the run must say what it trains: give --lora.r 8 and other fields of LoraConfig, or "
        "--full.",
        "- training.output_dir is missing: --output DIR.",
    ):
        assert line in err


def test_all_that_is_wrong_is_told_at_once(lemo, asked):
    wrong = {
        "--training.learning_rat": 1,
        "--lora.rr": 1,
        "--retention": 50,
        "--data.packng": "true",
        "--training.max_steps": '"20"',
    }
    code, _, err = lemo(*asked(**wrong))
    assert code == 2 and "5 mistakes:" in err
    for said in (
        "training.learning_rat=1: there is no such key; did you mean 'learning_rate'?",
        "lora.rr=1: there is no such key",
        "got 50.0 in retention=50.0: did you mean 0.5?",
        "data.packng=True: there is no such key; did you mean 'packing'?",
        "training.max_steps must be int, got '20': did you mean 20, without quotes?",
    ):
        assert said in err


def test_what_is_not_there_is_told_at_once(lemo, asked, tmp_path):
    (tmp_path / "modell").mkdir()
    wrong = {
        "--model": "model",
        "--dataset": "boks.jsonl",
        "--data.eval_dataset": "books.jsonl",
        "--data.text_column": "bodi",
        "--lemo.predictor": "predictr",
    }
    (tmp_path / "predictor").mkdir()
    code, _, err = lemo(*asked(**wrong))
    assert code == 2 and "4 mistakes:" in err
    for said in (
        "model 'model'; did you mean 'modell'?",
        "there is no file 'boks.jsonl'; did you mean 'books.jsonl'?",
        "its columns are: text, body; did you mean 'body'? Name the column with the text in "
        "data.text_column.",
        "give a directory; did you mean 'predictor'?",
    ):
        assert said in err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--lora.target_modules", "[q_proj, v_prj]", "no module 'v_prj'; did you mean 'v_proj'?"),
        ("--lora.target_modules", "qq", "'qq' is a regular expression, and it matches the whole"),
        ("--lora.target_modules", "q_proj", "For names of modules give a list: [q_proj]."),
        ("--lora.exclude_modules", "[nosuch]", "exclude_modules: the model has no module 'nosuch'"),
        ("--lora.target_parameters", "[q_proj.wight]", "did you mean 'q_proj.weight'?"),
        ("--lora.layers_to_transform", "[0, 99]", "the model has no layer 99: its layers are 0 to"),
        ("--lora.layers_to_transform", 10, "the model has no layer 10: its layers are 0 to 9."),
        ("--lora.peft_type", "IA3", "lora.peft_type='IA3' has no effect, since lemo train makes"),
        ("--training.do_train", "false", "training.do_train=False has no effect"),
        ("--training.group_by_length", "true", "train_sampling_strategy group_by_length."),
        ("--training.no_cuda", "true", "no such key any more: give --training.use_cpu true."),
        ("--lemo.finish_retention", 0.1, "0.1 keeps less than retention=0.3 of the steps before"),
        ("--data.eval_split", "test", "eval_split='test': files have no splits, so these are the"),
        ("--data.split", "odd", "split='odd': files have no splits"),
        ("--lemo.dense_first_layers", 10, "leave no sparse layer: the model has 10"),
        ("--lemo.retention", "[0.5, 0.5]", "retention has 2 entries, the model has 10 layers"),
        ("--lemo.policy", "overlp", "got 'overlp'; did you mean 'overlap'?"),
        ("--lemo.recompute", "ful", "got 'ful'; did you mean 'full'?"),
        ("--lemo.block_size", '"64"', "got '64': did you mean 64?"),
        ("--lemo.dense_finish", 10, "dense_finish must lie in [0, 1], or be None, got 10: did you"),
        ("--model.dtype", "bfloat", "got 'bfloat'; did you mean 'bfloat16'?"),
    ],
)
def test_what_may_have_been_meant(flag, value, message, lemo, asked):
    code, out, err = lemo(*asked(**{flag: value}))
    assert code == 2 and message in err and not out


def test_flags_of_a_section_that_is_left_out_are_refused(lemo, asked):
    for flags, message in (
        ({"--lemo.retention": 0.4, "--dense": "--report"}, "--lemo.retention sets it"),
        ({"--full": "--report"}, "--full trains all parameters, without LoRA, and --lora.r sets"),
    ):
        code, out, err = lemo(*asked(**flags))
        assert code == 2 and message in err and not out


def test_yaml_reads_no_as_false_and_a_strategy_is_called_no(lemo, asked):
    code, out, err = lemo(*asked(**{"--training.save_strategy": "no"}), "--dry-run")
    assert code == 0, err
    assert yaml.safe_load(out)["training"]["save_strategy"] is False


def test_a_dry_run_reads_model_and_data(lemo, asked):
    code, out, err = lemo(*asked(), "--dry-run")
    assert code == 0, err
    assert f"# {MODEL} is a llama of 10 layers, 1,862,272 parameters and 512 positions." in out
    assert "# books.jsonl has rows of text." in out
    assert yaml.safe_load(out)["data"]["tokens"] == 8
    code, out, err = lemo(*asked(), "--dry-run", "--json")
    found = json.loads(out)
    assert found["settings"]["data"]["tokens"] == 8 and len(found["found"]) == 2
    code, _, err = lemo(*asked(**{"--data.text_column": "bod"}), "--dry-run")
    assert code == 2 and "did you mean 'body'?" in err


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("calibrate", ("--retention", 0.5, "--output", "out")),
        ("train-predictor", ("--output", "out")),
        ("eval perplexity", ("--max-length", 64)),
        ("eval retrieval", ("--length", 64)),
    ],
)
def test_other_commands_look_at_the_data_first(command, more, lemo, asked, monkeypatch):
    loaded = []
    monkeypatch.setattr("lemo_hf.cli.options.ModelOptions.load", lambda *_: loaded.append(1))
    shared = (*command.split(), "--model", MODEL, *more)
    code, _, err = lemo(*shared, "--dataset", "bookss.jsonl")
    assert code == 2 and "there is no file 'bookss.jsonl'; did you mean 'books.jsonl'?" in err
    code, _, err = lemo(*shared, "--dataset", "books.jsonl", "--text-column", "bdy")
    assert code == 2 and "has no column 'bdy', its columns are: text, body; did you mean" in err
    assert not loaded


@pytest.mark.parametrize("name", ["books.jsonl", "books.json", "books.parquet"])
def test_a_picture_is_of_a_text(name, lemo, asked, tmp_path):
    (tmp_path / name).write_text("{}")
    code, _, err = lemo("inspect", "--model", MODEL, "--text", name, "--json")
    assert code == 2 and f"--text {name} holds rows, not a text: write the text of one" in err


def test_a_task_is_looked_up_first(lemo, asked, monkeypatch):
    monkeypatch.setattr("lemo_hf.cli.options.ModelOptions.load", lambda *_: 1 / 0)
    flags = ("--model", MODEL, "--output", "out", "--task", "hotpotq")
    code, _, err = lemo("eval", "longbench", *flags)
    assert code == 2 and "did you mean 'hotpotqa'?" in err


def test_checkpointing_has_two_names(lemo, asked):
    """transformers 5.17 knows one, 5.23 warns of it; the later one said wins."""
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        code, out, err = lemo(*asked(**{f"--training.{name}": "true"}), "--dry-run")
        assert code == 0 and "deprecated" not in err, err
        assert yaml.safe_load(out)["training"]["activation_checkpointing"] is True


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"--training.report_to": "clearml"},
            "training.report_to='clearml' needs a package that is not installed: pip install",
        ),
        ({"--training.report_to": "wandbb"}, "there is no tracker 'wandbb'; did you mean 'wandb'?"),
        (
            {
                "--training.load_best_model_at_end": "true",
                "--training.metric_for_best_model": "accuracy",
                "--training.eval_strategy": "steps",
                "--training.save_strategy": "steps",
                "--data.eval_dataset": "books.jsonl",
            },
            "training.metric_for_best_model='accuracy': evaluation computes the loss alone",
        ),
        (
            {"--training.gradient_accumulation_steps": 0},
            "training.gradient_accumulation_steps must be at least 1, got 0",
        ),
        (
            {"--training.per_device_train_batch_size": 0},
            "training.per_device_train_batch_size must be at least 1, got 0",
        ),
    ],
)
def test_what_trainer_would_only_find_later(flags, said, lemo, asked, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_clearml_available", lambda: False)
    code, out, err = lemo(*asked(**flags))
    assert code == 2 and said in err and not out, err
    assert "Traceback" not in err


def test_settings_that_a_user_wrote_are_not_replaced(lemo, asked, tmp_path):
    code, text, err = lemo(*asked(), "--dry-run")
    assert code == 0, err
    written = tmp_path / "out" / "lemo_train.yaml"
    written.parent.mkdir()
    written.write_text("# why\n" + text)
    for flags in ((), ("--overwrite",)):
        code, _, err = lemo("train", "--config", written, *flags)
        assert code == 2 and "lemo_train.yaml was not written by lemo train" in err
    assert written.read_text().startswith("# why")
