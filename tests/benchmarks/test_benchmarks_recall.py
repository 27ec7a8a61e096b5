"""The recall benchmark on a tiny random model: rows, rankings, and what it writes."""

import json

import numpy as np
import pytest
from support.models import save_tiny
from support.paths import DEMO
from transformers import AutoTokenizer

from benchmarks.quality import recall
from benchmarks.quality.source import Source
from benchmarks.quality.texts import Texts
from lemo_hf import LeMoPredictor
from lemo_hf.cli.train_predictor import _rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the demo's tokenizer, and texts of two books."""
    folder = tmp_path_factory.mktemp("recall")
    tokenizer = save_tiny(folder / "base")
    books = {}
    for split, name in (("train", "train-alice-adams"), ("test", "heldout-oh-money-money")):
        text = (DEMO / "text" / f"{name}.txt").read_text()[:60_000]
        books[split] = [np.array(tokenizer(text)["input_ids"], np.uint16)]
    Texts(books, books, books, {}).save(folder)
    return folder


def arguments(folder, output, *more):
    shared = ("--model", folder / "base", "--data", folder, "--tokens", 1024, "--train-rows", 3)
    return [str(value) for value in (output, *shared, *more)]


def test_every_ranking_of_every_kind(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recall, "QUESTIONS", 2)
    layers = ("--layers", 0, 2, "--oracles", 0, 3, "--rows", 1, "--block-size", 32)
    saved = ("--save", tmp_path / "predictor")
    recall.main(arguments(folder, tmp_path / "out.json", *layers, *saved))
    found = json.loads((tmp_path / "out.json").read_text())["rows"]
    rankings = {(row["ranking"], row["layer"]) for row in found}
    assert {("overlap, 1 hops", None), ("recent", None), ("random", None)} <= rankings
    assert {("oracle", 3), ("oracle from", 0), ("pooled", 3), ("predictor", 2)} <= rankings
    assert ("overlap, 2 hops + predictor", 0) in rankings
    assert len(found) == len(rankings) * len(recall.KINDS) * len(recall.RETENTIONS)
    assert all(0 <= row["recall"] <= 1 for row in found)
    shares = {
        (row["kind"], row["retention"]): row["recall"]
        for row in found
        if row["ranking"] == "overlap, 1 hops"
    }
    assert shares["value", 0.3] == 1  # words are in common
    assert "| recall at retention 0.3 | layer | value |" in capsys.readouterr().out
    assert LeMoPredictor.from_pretrained(tmp_path / "predictor").known == [0, 2]


def test_rows_are_of_one_kind_and_know_what_they_need(folder):
    source = Source(Texts.load(folder), AutoTokenizer.from_pretrained(folder / "base"))
    for kind in recall.KINDS:
        row = recall.test_row(source, 2048, kind, 0)
        assert set(row.kinds) == {kind} and len(row.kinds) == recall.QUESTIONS
        assert row.gold_blocks(64).any() and not row.labelled[: row.asked_from].any()


def test_exported_rows_are_what_the_command_trains_on(folder, tmp_path):
    recall.main(arguments(folder, tmp_path / "rows.jsonl", "--export"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = _rows([str(tmp_path / "rows.jsonl")], "train", "text", tokenizer, 1024, 9, False)
    assert [len(row["input_ids"]) for row in rows] == [1024] * 3
    labelled = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert labelled[2] == 1024 and min(labelled[:2]) > 0 and max(labelled[:2]) < 200
