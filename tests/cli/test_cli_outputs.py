"""No result of a command replaces what the user has there."""

import json

import pytest
from support.hub_client import make_predictor
from support.paths import DEMO, MODEL

from lemo_hf import LeMoConfig

TEXT = DEMO / "text" / "heldout-oh-money-money.txt"
ON = ("--model", MODEL, "--dataset")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with texts; no model is read."""
    monkeypatch.chdir(tmp_path)

    def refused(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lemo_hf.cli.options.load_causal_lm", refused)
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": "one two three"}))
    (tmp_path / "books.json").write_text(json.dumps({"text": "one two three"}))
    (tmp_path / "small.txt").write_text("one two three")
    (tmp_path / "kept.txt").write_text("one two three")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("eval perplexity {} books.json --output books.json", "books.json, which is read"),
        ("eval perplexity {} books.jsonl --output books.jsonl", "books.jsonl, which is read"),
        ("eval perplexity {} books.jsonl --output small.txt", "ends in .json"),
        ("eval retrieval {} small.txt --length 64 --plot small.txt", "small.txt, which is read"),
        ("eval retrieval {} small.txt --length 64 --plot books.json", "ends in .png"),
        ("eval retrieval {} small.txt --length 64 --output a --plot a", "are both a: give two"),
        ("report . --output books.jsonl", "ends in .html"),
        ("inspect --model MODEL --text kept.txt --output .", "kept.txt, which is read"),
    ],
)
def test_no_result_replaces_what_is_read_or_a_file_of_another_kind(command, said, lemo, here):
    before = {path: path.read_bytes() for path in here.iterdir()}
    words = command.replace("{}", "--model MODEL --dataset").split()
    code, out, err = lemo(*(MODEL if word == "MODEL" else word for word in words))
    assert code == 2 and said in err and not out, err
    assert before == {path: path.read_bytes() for path in here.iterdir()}


@pytest.mark.parametrize("task", ["perplexity", "retrieval"])
def test_no_result_replaces_a_file_of_a_model(task, lemo, here):
    """Whatever its name, and whosever model it is; an earlier result there may be replaced."""
    for folder, files in (
        ("model", ("config.json", "tokenizer.json", "model.safetensors.index.json")),
        ("adapter", ("adapter_config.json", "trainer_state.json", "list.json")),
        ("predictor", ("lemo_config.json",)),
    ):
        (here / folder).mkdir()
        for name in files:
            (here / folder / name).write_text("[1]" if name == "list.json" else '{"model": 1}')
        before = {path: path.read_bytes() for path in (here / folder).iterdir()}
        for path in before:
            command = ("eval", task, *ON, "small.txt", "--output", path)
            code, out, err = lemo(*command)
            assert code == 2 and not out, err
            assert f"{path} would replace a file that belongs to the model in {path.parent}" in err
        assert before == {path: path.read_bytes() for path in (here / folder).iterdir()}
    earlier = here / "model" / "result.json"
    earlier.write_text(json.dumps({"model": "m", "adapter": None, "dataset": ["d"], "x": 1}))
    for path in (earlier, here / "model" / "new.json", here / "books.json"):
        length = {"perplexity": "--max-length", "retrieval": "--length"}[task]
        _, _, err = lemo("eval", task, *ON, "small.txt", length, 64, "--output", path)
        assert "a model was loaded" in err  # nothing was refused before


@pytest.mark.parametrize(
    "command",
    [
        "calibrate {} small.txt --retention 0.5 --output",
        "train-predictor {} small.txt --output",
        "inspect --model MODEL --text small.txt --output",
        "report . --output",
        "merge --adapter a --output",
        "eval perplexity {} small.txt --output",
        "eval retrieval {} small.txt --length 64 --plot",
        "eval longbench --model MODEL --output",
    ],
)
def test_an_empty_path_is_not_this_directory(command, lemo, here):
    words = command.replace("{}", "--model MODEL --dataset").split()
    code, _, err = lemo(*(MODEL if word == "MODEL" else word for word in words), "")
    assert code == 2 and "'' is empty: give a path ('.' is this directory)" in err, err


def test_settings_do_not_replace_a_predictor(lemo, here):
    predictor = here / "predictor"
    make_predictor(dense=[0]).save_pretrained(predictor)
    before = {path: path.read_bytes() for path in predictor.iterdir()}
    way_out = "predictor holds a predictor, which these settings would replace"
    more = ("--retention", 0.5, "--output", predictor)
    code, _, err = lemo("calibrate", *ON, TEXT, *more)
    assert code == 2 and way_out in err
    for flags in ((), ("--overwrite",)):
        train = ("--tokens", 64, "--full", "--training.max_steps", 1, "--output", predictor)
        code, _, err = lemo("train", *ON, TEXT, *train, "--training.use_cpu", "true", *flags)
        assert code == 2 and way_out in err
    with pytest.raises(ValueError, match=way_out):
        LeMoConfig().save_pretrained(predictor)
    assert before == {path: path.read_bytes() for path in predictor.iterdir()}
    LeMoConfig.from_pretrained(predictor).save_pretrained(predictor)  # its own
    LeMoConfig().save_pretrained(predictor, replace_predictor=True)
