"""What newcomers give instead of what is meant is told in words that help them on."""

import shutil

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
