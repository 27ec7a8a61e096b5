"""What newcomers give instead of what is meant is told in words that help them on."""

import json
import shutil

import datasets
import pytest
from peft import LoraConfig, get_peft_model
from support.paths import DEMO
from transformers import AutoModelForCausalLM

MODEL = str(DEMO / "model")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an adapter over ``model``, which is there too, and a book."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), LoraConfig(r=2))
    model.save_pretrained("adapter")
    (tmp_path / "book.txt").write_text("The sea was quiet. " * 99)
    return tmp_path


def test_an_adapter_as_the_model(lemo, folder):
    lemo_train = ("train", "--dataset", "book.txt", "--tokens", 64, "--full", "--output", "out")
    for command in (
        ("plan",),
        ("eval", "perplexity", "--dataset", "book.txt"),
        (*lemo_train, "--training.use_cpu"),
    ):
        code, _, err = lemo(*command, "--model", "adapter")
        assert code == 2 and "model 'adapter' is an adapter over 'model': merge it first" in err
        assert "--model model with --adapter adapter where the command takes it" in err


def test_what_is_no_adapter(lemo, folder):
    (folder / "empty").mkdir()
    for command in (
        ("eval", "perplexity", "--model", "model", "--dataset", "book.txt"),
        ("merge", "--model", "model", "--output", "merged"),
    ):
        for name, message in (
            ("adaptr", "give a directory; did you mean 'adapter'?"),
            ("model", "--adapter model is a whole model, not an adapter: give it as --model"),
            ("empty", "--adapter empty has no adapter_config.json: give a folder with a PEFT"),
        ):
            code, _, err = lemo(*command, "--adapter", name)
            assert code == 2 and message in err and "?." not in err, err


def test_merging_where_the_base_model_is_not(lemo, folder, monkeypatch):
    (folder / "other").mkdir()
    monkeypatch.chdir(folder / "other")
    code, _, err = lemo("merge", "--adapter", "../adapter", "--output", "merged")
    assert code == 2 and "names its base model 'model', which is not here: give it by" in err
    code, _, err = lemo(
        "merge", "--adapter", "../adapter", "--output", "merged", "--model", "../model"
    )
    assert code == 0, err


def test_a_file_where_a_folder_is_meant(lemo, folder):
    (folder / "run.yaml").write_text("model: {}")
    train = ("train", "--dataset", "book.txt", "--tokens", 64, "--full", "--output", "out")
    for command in (
        ("plan", "--config", "run.yaml"),
        ("inspect", "--text", "book.txt", "--json", "--config", "run.yaml"),
        (*train, "--lemo.config", "run.yaml"),
    ):
        code, _, err = lemo(*command, "--model", "model")
        assert code == 2 and "'run.yaml' is a file: give the directory that holds lemo_con" in err
        assert "did you mean" not in err


@pytest.fixture
def train(lemo, folder):
    """`lemo train` with some more flags: its code and its messages."""
    asked = {"--model": "model", "--dataset": "book.txt", "--tokens": 64, "--lora.r": 2}
    asked |= {"--output": "out", "--training.use_cpu": "true", "--training.max_steps": 1}

    def told(**more):
        given = {name: value for name, value in {**asked, **more}.items() if value is not None}
        code, _, err = lemo("train", *(word for pair in given.items() for word in pair))
        assert code == 2 and "Traceback" not in err
        return err

    return told


def test_data_that_lemo_train_cannot_take(train, folder):
    (folder / "short.txt").write_text("one")
    for more in ({}, {"--data.packing": "true"}):
        assert "of short.txt ha" in train(**{"--dataset": "short.txt"}, **more)
    rows = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (folder / "pairs.jsonl").write_text(json.dumps(rows))
    assert "LeMoDPOTrainer of lemo_hf.integrations" in train(**{"--dataset": "pairs.jsonl"})
    one = datasets.Dataset.from_list([{"text": "a"}])
    one.save_to_disk("one")
    datasets.DatasetDict({"train": one}).save_to_disk("several")
    for name in ("one", "several"):
        assert "write it with ds.to_parquet('x.parquet') and give" in train(**{"--dataset": name})
    for name, content in (("l.txt", "café"), ("l.jsonl", '{"text": "café"}')):
        (folder / name).write_bytes(content.encode("latin-1"))
        message = train(**{"--dataset": name})
        assert f"{name}" in message and "is not UTF-8 text" in message and "as UTF-8." in message
    template = train(**{"--data.chat_template": "l.txt"})
    assert "l.txt is not UTF-8 text" in template
    nothing = train(**{"--dataset": None, "--data.dataset": "[]"})
    assert "dataset=[] names nothing: name a dataset" in nothing


def test_names_that_are_nearly_right(train, folder):
    message = train(**{"--model.rope_type": "yarnn"})
    assert (
        "must be one of linear, yarn, dynamic, None, got 'yarnn'; did you mean 'yarn'?" in message
    )
    assert "--lora.r: lora.r must be at least 1, got 0." in train(**{"--lora.r": 0})
    (folder / "data").mkdir()
    (folder / "data" / "books.txt").write_text("a")
    assert "did you mean 'data/books.txt'?" in train(**{"--dataset": "data/boks.txt"})


def test_documents_that_are_too_short_are_named(lemo, folder):
    (folder / "short.txt").write_text("one")
    for command, more in (("calibrate", ("--retention", 0.5)), ("train-predictor", ())):
        data = ("--model", "model", "--dataset", "short.txt", "--tokens", 64, "--output", "out")
        code, _, err = lemo(command, *data, *more)
        assert code == 2 and "no document of short.txt has 64 tokens: the longest has" in err


def test_small_plans_are_in_mebibytes(lemo, folder):
    code, out, err = lemo("plan", "--model", "model", "--tokens", 512)
    assert code == 0 and out.split()[:2] == ["MiB", "LeMo"], err
    peak = next(line.split()[1] for line in out.splitlines() if line.startswith("peak"))
    assert float(peak) > 60 and f" {peak}." in out and "GiB" not in out
