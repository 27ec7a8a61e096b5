"""The command line: what it writes, and that a mistake is one line and exit code 2."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from support.hub_client import BASE, make_predictor
from support.models import make_model
from support.paths import DEMO
from transformers import AutoTokenizer

from lemo_hf import LeMoConfig, LeMoPredictor
from lemo_hf.cli.app import app

BOOK = str(DEMO / "text" / "train-alice-adams.txt")


def calibrate(output, *more, model=DEMO / "model", dataset=BOOK):
    small = ("--rows", 1, "--tokens", 256, "--dtype", "float32", "--block-size", 64)
    shared = ("--model", model, "--dataset", dataset, "--output", output)
    return ("calibrate", *shared, *small, *more)


def commands(group, *words):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield (*words, name), command


def test_help_is_whole_at_80_columns(lemo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    every = list(commands(typer.main.get_command(app)))
    assert len(every) > 9
    for words, command in [((), None), (("eval",), None), *every]:
        code, out, _ = lemo(*words, "--help")
        assert code == 0 and "…" not in out and "..." not in out.replace("]...", ""), words
        assert max(map(len, out.splitlines())) <= 80, words
        for name in [] if command is None else [x for p in command.params for x in p.opts]:
            assert name in out, (words, name)


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, lemo_hf.cli.app; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DEMO.parent.parent)


def test_calibrate(lemo, tmp_path):
    code, out, err = lemo(*calibrate(tmp_path, "--retention", 0.5))
    assert code == 0 and "mean retention 0.5" in out and "thresholds: " in out
    assert "passes over the rows" in err  # the progress bar
    config = LeMoConfig.from_pretrained(tmp_path)
    assert config.block_size == 64 and len(config.threshold) == 10


def test_calibrate_as_json_with_longer_positions(lemo, tmp_path):
    LeMoConfig(policy="random", dense_first_layers=8).save_pretrained(tmp_path / "start")
    code, out, _ = lemo(
        *calibrate(tmp_path / "new", "--retention", 0.6, "--json"),
        *("--rope-parameters", '{"rope_type": "linear", "factor": 2.0}'),
        *("--max-position-embeddings", 1024, "--config", tmp_path / "start"),
    )
    assert code == 0
    result = json.loads(out)
    config = LeMoConfig.from_pretrained(tmp_path / "new")
    assert LeMoConfig.from_dict(result["config"]) == config
    assert config.policy == "random" and config.threshold[:8] == (0,) * 8
    assert result["history"][-1]["thresholds"] == list(config.threshold)


def test_calibrating_predictors_keeps_what_they_are(lemo, tmp_path):
    make_model("llama", vocab_size=2048).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(tmp_path / "model")
    predictor = make_predictor(base=dataclasses.replace(BASE, vocab_size=2048))
    predictor.save_pretrained(tmp_path / "learned")
    before = json.loads((tmp_path / "learned" / "lemo_config.json").read_text())
    card = (tmp_path / "learned" / "README.md").read_bytes()
    options = ("--predictor", tmp_path / "learned", "--block-size", 8)
    for output in ("new", "learned"):
        code, _, err = lemo(
            *calibrate(tmp_path / output, "--retention", 0.6, *options, model=tmp_path / "model")
        )
        assert code == 0, err
        after = json.loads((tmp_path / output / "lemo_config.json").read_text())
        assert after["predictor"] == before["predictor"] and len(after["threshold"]) == 4
        assert {name for name in before if before[name] != after[name]} == {
            "retention",
            "threshold",
            "agree_across_layers",
        }
        assert LeMoPredictor.from_pretrained(tmp_path / output).same_as(predictor)
    assert (tmp_path / "learned" / "README.md").read_bytes() == card
    config = LeMoConfig.from_pretrained(tmp_path / "learned")
    assert config.predictor == str(tmp_path / "learned")
    config.save_pretrained(tmp_path / "learned")  # does not put its own name in their place
    assert LeMoPredictor.from_pretrained(tmp_path / "learned").same_as(predictor)


def learn(output, *more, book=("--dataset", BOOK)):
    small = ("--rows", 5, "--heldout-rows", 1, "--tokens", 256, "--rank", 8, "--block-size", 16)
    shared = ("--model", DEMO / "model", *book, "--epochs", 1, "--output", output)
    return ("train-predictor", *shared, *small, *more)


def test_train_predictor(lemo, tmp_path):
    code, out, err = lemo(*learn(tmp_path / "all", "--layer", 3, "--layer", 1))
    assert code == 0, err
    predictor = LeMoPredictor.from_pretrained(tmp_path / "all")
    assert predictor.known == [1, 3] and predictor.info.training["rank"] == 8
    for row in predictor.info.recall:
        line = f"layer {row['layer']}, retention {row['retention']:g}: recall of {row['policy']} "
        assert f"{line}{row['recall']:.3f}" in out
    assert {row["policy"] for row in predictor.info.recall} > {"predictor", "pooled"}
    card = (tmp_path / "all" / "README.md").read_text()
    assert "lemo train-predictor --model" in card
    assert not (tmp_path / "all" / "training_state").exists()
    chapters = tmp_path / "other.txt"
    chapters.write_text(Path(BOOK).read_text()[40_000:])
    for folder in ("all", "fresh"):  # what a folder held before changes nothing
        more = ("--layer", 3, "--layer", 1)
        code, _, err = lemo(*learn(tmp_path / folder, *more, book=("--dataset", chapters)))
        assert code == 0, err
    found = [LeMoPredictor.from_pretrained(tmp_path / folder) for folder in ("all", "fresh")]
    assert found[0].same_as(found[1]) and not found[0].same_as(predictor)
    for rate in ("nan", "-1", "0", "inf"):
        code, _, err = lemo(*learn(tmp_path / "none", "--learning-rate", rate))
        assert code == 2 and f"--learning-rate {rate}: give a number above 0" in err
    code, _, err = lemo(*learn(tmp_path / "none", "--heldout-rows", 5))
    assert code == 2 and "--heldout-rows takes 5 of them" in err


@pytest.mark.parametrize("columns", ["texts", "tokens"])
def test_train_predictor_on_answers(lemo, tmp_path, columns):
    """Rows keep their labels, and their length."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(5):
            prompt = (DEMO / "text" / "train-alice-adams.txt").read_text()[900 * i :][: 500 + 9 * i]
            row = {"prompt": prompt, "completion": f" Answer {i}"}
            if columns == "tokens":
                ids = [tokenizer(text)["input_ids"] for text in row.values()]
                row = {"input_ids": [*ids[0], *ids[1]], "labels": [-100] * len(ids[0]) + ids[1]}
            print(json.dumps(row), file=file)
    code, out, err = lemo(*learn(tmp_path / "out", "--dataset", tmp_path / "rows.jsonl", book=()))
    assert code == 0, err
    assert "recall of overlap" in out  # a part of each row is labelled
    predictor = LeMoPredictor.from_pretrained(tmp_path / "out")
    assert predictor.info.training["rows"] == 4 and predictor.info.training["tokens"] < 4 * 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--retention", 0.5, "--text-column", "body"), "no column 'body', its columns are: text"),
        ((), "Missing option '--retention'"),
        (("--retention", 7), r"retention must lie in (0, 1], got 7.0"),
        (
            ("--retention", 0.5, "--rope-parameters", "{linear}"),
            "--rope-parameters is not valid JSON",
        ),
        (("--retention", 0.5, "--rope-parameters", "[2]"), "must be a JSON object, got [2]"),
        (("--retention", 0.5, "--device", "abacus"), "--device 'abacus'"),
        pytest.param(
            ("--retention", 0.5, "--device", "cuda"),
            "--device 'cuda': PyTorch finds no CUDA GPU here: give cpu.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (("--retention", 0.5, "--tokens", 10**7), "txt has 10000000 tokens: the longest"),
        (("--retention", 0.5, "--predictor", DEMO / "model"), "has no lemo_config.json"),
        (("--retention", 0.5, "--rows", 0), "--rows"),
    ],
)
def test_mistakes(arguments, message, lemo, tmp_path):
    code, _, err = lemo(*calibrate(tmp_path / "out", *arguments))
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_what_does_not_exist(lemo, tmp_path):
    code, _, err = lemo(*calibrate(tmp_path, "--retention", 0.5, model=tmp_path / "nothing"))
    assert code == 2 and "nothing" in err and "Traceback" not in err
    missing = tmp_path / "none.jsonl"
    code, _, err = lemo(*calibrate(tmp_path, "--retention", 0.5, dataset=missing))
    assert code == 2 and "there is no file" in err
