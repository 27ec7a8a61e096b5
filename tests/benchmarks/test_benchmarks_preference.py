"""The benchmark of DPO steps runs, and what it writes is what it has measured."""

import argparse
import re
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from support.paths import DEMO, ROOT
from transformers import AutoTokenizer

pytest.importorskip("trl", minversion="1.16")
sys.path.append(str(ROOT / "benchmarks"))

import bench_preference
from record import load

from benchmarks.quality.preference import cut, pairs
from benchmarks.quality.row import RowSet
from benchmarks.quality.source import Source
from benchmarks.quality.texts import Texts

ASKED = {
    "model": "Llama-3 8B",
    "prompt": 256,
    "completion": 32,
    "providers": None,
    "steps": 1,
    "rounds": 2,
    "commit": "abc",
    "tiny": True,
    "command": "python",
}


def test_providers_take_turns(tmp_path, monkeypatch):
    """Turns in this process, since three of them take longer to begin than to run."""
    args = argparse.Namespace(**ASKED, output=tmp_path / "found.json")
    turns = []

    def here(provider, argv):
        turns.append(provider)
        return bench_preference.turn(provider, args, torch.device("cpu"))

    monkeypatch.setattr(bench_preference, "in_a_process", here)
    rows = bench_preference.run(args, [], torch.device("cpu"))
    names = bench_preference.providers()
    assert turns == names * 2 and [row["provider"] for row in rows] == names
    assert {"trl", "lemo 0.3", "lemo 0.15"} <= set(names)
    header, written = load(args.output)
    assert written == rows and header["trl"] and header["commit"] == "abc"
    for row in rows:
        if row["provider"] == "trl+liger":  # it needs a GPU
            continue
        assert row["status"] == "ok" and row["rounds"] == 2 and row["ms_median"] > 0
        assert row["loss"] == pytest.approx(0.693, abs=0.05)


@pytest.mark.soak
def test_a_turn_is_a_process_and_says_what_failed(tmp_path):
    found = bench_preference.in_a_process("lemo 2", ["--tiny", "--prompt", "64"])
    assert found["status"].startswith("failed: ValueError: retention must lie")


def test_pairs_ask_for_one_fact_and_reject_another():
    """The question stands whole before its answer, and the book tells both numbers."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "text" / "train-alice-adams.txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.uint16)
    none = {"train": [], "test": []}
    source = Source(Texts({"train": [ids], "test": [ids]}, none, none, {}), tokenizer)
    for pair in islice(pairs(source, RowSet("lexical", 1024)), 20):
        prompt = tokenizer.decode(pair.prompt)
        book, _, question = prompt.rpartition("Questions about the text above.")
        assert re.fullmatch(r"\nQuestion: What is the number of the [\w ]+\?\nAnswer:", question)
        thing = question.split("number of the ")[1].split("?")[0]
        assert tokenizer.decode(cut(pair.prompt, 0.3)).endswith(question)
        assert len(cut(pair.prompt, 0.3)) == round(0.3 * len(pair.prompt))
        right, wrong = tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)
        assert f"The number of the {thing} is{right}." in book
        assert right != wrong and re.search(rf"number of the [\w ]+ is{wrong}\.", book)
