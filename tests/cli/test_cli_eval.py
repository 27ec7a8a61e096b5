"""`lemo eval`: what it prints and writes is what the functions return."""

import json
import math
import sys

import numpy as np
import pytest
from support.models import with_lora
from support.paths import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf.eval.needles import needle_rows
from lemo_hf.eval.perplexity import perplexity
from lemo_hf.eval.retrieval import retrieval

MODEL = DEMO / "model"
BOOK = str(DEMO / "text" / "train-alice-adams.txt")
TEXT = (DEMO / "text" / "heldout-oh-money-money.txt").read_text()[20_000:32_000]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_perplexity(lemo, tmp_path, book, model, tokenizer):
    shared = ("--model", MODEL, "--max-length", 256, "--batch-size", 4, "--dtype", "float32")
    picture, result = tmp_path / "loss.png", tmp_path / "out" / "result.json"
    code, out, err = lemo(
        *("eval", "perplexity", *shared, "--dataset", book),
        *("--plot", picture, "--output", result),
    )
    assert code == 0, err
    ids = tokenizer(TEXT)["input_ids"]
    expected = perplexity(model, [ids], max_length=256, progress=False)
    written = json.loads(result.read_text())
    assert written["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert written["tokens"] == expected.tokens == len(ids) - 1
    assert f"perplexity {expected.perplexity:.3f}" in out and f"Wrote {picture}" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    np.array(ids, "<u2").tofile(tmp_path / "ids.bin")
    code, out, _ = lemo(
        *("eval", "perplexity", *shared, "--dataset", tmp_path / "ids.bin"),
        *("--protocol", "longlora", "--stride", 100, "--json"),
    )
    longlora = perplexity(
        model, [np.array(ids)], max_length=256, stride=100, protocol="longlora", progress=False
    )
    assert json.loads(out)["perplexity"] == pytest.approx(longlora.perplexity, rel=1e-6)


@pytest.mark.parametrize("command", ["perplexity", "retrieval"])
def test_outputs_are_checked_before_the_work(lemo, tmp_path, book, command, monkeypatch):
    """Before a model is loaded: there is none of this name."""
    (tmp_path / "file").write_text("")
    shared = ("eval", command, "--model", "nowhere/at-all", "--dataset", book)
    for option in ("--output", "--plot"):
        for path, why in ((tmp_path / "file" / "x", "not a directory"), (tmp_path, "a directory")):
            code, _, err = lemo(*shared, option, path)
            assert code == 2 and f"{option} {path} cannot be written: " in err and why in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = lemo(*shared, "--plot", tmp_path / "x.png")
    assert code == 2 and "pictures need matplotlib" in err


@pytest.mark.parametrize("as_json", [True, False])
def test_the_number_is_printed_before_it_is_written(lemo, tmp_path, book, as_json):
    """Of a disk that is full at the end."""
    shared = ("--model", MODEL, "--dataset", book, "--max-length", 256, "--dtype", "float32")
    more = ("--json",) if as_json else ()
    code, out, err = lemo("eval", "perplexity", *shared, "--output", "/dev/full", *more)
    assert code == 2 and "No space left on device" in err and "Traceback" not in err
    assert json.loads(out)["perplexity"] > 1 if as_json else out.startswith("perplexity ")


def test_adapters_and_stretched_positions(lemo, tmp_path, book, model, tokenizer):
    tuned = with_lora(AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"))
    tuned.save_pretrained(tmp_path / "adapter")
    shared = ("--model", MODEL, "--dataset", book, "--dtype", "float32", "--json")
    found = {}
    for name, more in {
        "plain": ("--max-length", 512),
        "adapter": ("--max-length", 512, "--adapter", tmp_path / "adapter"),
        "long": ("--max-length", 1024),
        "stretched": ("--max-length", 1024, "--rope-type", "yarn"),
    }.items():
        code, out, err = lemo("eval", "perplexity", *shared, *more)
        assert code == 0, err
        found[name] = json.loads(out)["perplexity"]
    ids = tokenizer(TEXT)["input_ids"]
    expected = perplexity(tuned, [ids], max_length=512, progress=False).perplexity
    assert found["adapter"] == pytest.approx(expected, rel=1e-5)
    assert found["adapter"] > 1.5 * found["plain"]  # its B is random
    assert found["stretched"] < found["long"]  # 512 positions were trained


def test_retrieval(lemo, tmp_path, book, model, tokenizer):
    picture = tmp_path / "needles.png"
    code, out, err = lemo(
        *("eval", "retrieval", "--model", MODEL, "--dataset", book, "--dtype", "float32"),
        *("--length", 256, "--length", 384, "--depth", 0.2, "--depth", 0.9, "--samples", 2),
        *("--plot", picture, "--json"),
    )
    assert code == 0, err
    rows = needle_rows(
        [TEXT], tokenizer, lengths=[256, 384], depths=[0.2, 0.9], samples=2, progress=False
    )
    expected = retrieval(model, rows, progress=False)
    written = json.loads(out)
    for cell, other in zip(written["cells"], expected.cells, strict=True):
        assert cell == pytest.approx(other, rel=1e-4)
    assert written["keys"] == 1 and picture.read_bytes()[:4] == b"\x89PNG"
    assert -math.inf < written["log_probability"] < 0


def test_longbench(lemo, tmp_path):
    rows = [
        {"input": "Who ran?", "context": f"{name} ran. " * 30, "answers": [name], "length": 60}
        | {"dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": name}
        for name in ("Ann", "Bob")
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ("eval", "longbench", "--output", tmp_path / "out")
    code, out, err = lemo(
        *(*run, "--model", MODEL, "--data", data, "--task", "hotpotqa", "--dtype", "float32"),
        *("--max-length", 200, "--batch-size", 2),
    )
    assert code == 0, err
    lines = (tmp_path / "out" / "hotpotqa.jsonl").read_text().splitlines()
    assert [json.loads(line)["answers"] for line in lines] == [["Ann"], ["Bob"]]
    assert "hotpotqa" in out and "result.json" in out
    told = [{**json.loads(line), "pred": "Ann"} for line in lines]
    folder = tmp_path / "told"
    folder.mkdir()
    (folder / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    code, out, _ = lemo("eval", "longbench", "--output", folder, "--score-only", "--json")
    assert code == 0 and json.loads(out) == {"hotpotqa": 50.0}
    assert json.loads((folder / "result.json").read_text()) == {"hotpotqa": 50.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("longbench", "--output", "nowhere"), "give --model, or --score-only"),
        (("longbench", "--output", "nowhere", "--score-only"), "there is no folder 'nowhere'"),
        (
            ("longbench", "--output", "nowhere", "--score-only", "--task", "qasper"),
            "--task has no effect with --score-only: leave it out.",
        ),
        (
            ("longbench", "--output", "nowhere", "--score-only", "--no-chat-template"),
            "--no-chat-template has no effect with --score-only",
        ),
        (("perplexity", "--model", MODEL, "--dataset", "a.bin", "--dataset", "b.txt"), "all .bin"),
        (("perplexity", "--model", MODEL, "--dataset", "none.bin"), "there is no file 'none.bin'"),
        (
            ("perplexity", "--model", MODEL, "--dataset", BOOK, "--rope-type", "ntk"),
            "must be linear, yarn or dynamic, got 'ntk'",
        ),
        (("perplexity", "--model", MODEL, "--dataset", "x.bin", "--protocol", "own"), "--protocol"),
    ],
)
def test_mistakes(arguments, message, lemo):
    code, _, err = lemo("eval", *arguments)
    assert code == 2 and message in err and "Traceback" not in err
