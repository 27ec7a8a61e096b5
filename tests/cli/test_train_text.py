"""Rows of plain text for `lemo train`: streams, weights, and what is held out."""

import json
import re

import pytest
import torch
from support.paths import DEMO
from transformers import AutoTokenizer

from lemo_hf.batch.facts import BatchFacts
from lemo_hf.cli.train_rows import labels_cover_a_part, text_rows
from lemo_hf.cli.train_sections import DataSection

TOKENIZER = AutoTokenizer.from_pretrained(DEMO / "model")
TEXT = (DEMO / "text" / "train-alice-adams.txt").read_text()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files of lines, of which the second has more columns, and a folder with splits."""
    monkeypatch.chdir(tmp_path)
    pieces = [TEXT[i : i + 400] for i in range(2_000, 22_000, 400)]
    write("a.jsonl", [{"text": f"first {piece}"} for piece in pieces])
    write("b.jsonl", [{"id": 1, "text": f"second {piece}"} for piece in pieces])
    (tmp_path / "splits").mkdir()
    write("splits/train.jsonl", [{"text": pieces[0]}])
    write("splits/test.jsonl", [{"text": pieces[1]}])
    return pieces


def write(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def rows(**data):
    return text_rows(DataSection(**{"tokens": 32, **data}), TOKENIZER, 0, False)


def ids(found):
    return sorted(tuple(row["input_ids"]) for row in found)


@pytest.mark.parametrize("more", [{}, {"packing": True}, {"min_tokens": 8}])
def test_a_stream_has_the_rows_of_the_list_in_another_order(files, more):
    stream, none = rows(dataset="a.jsonl", streaming=True, **more)
    whole, _ = rows(dataset="a.jsonl", **more)
    assert none is None and not hasattr(stream, "__len__")
    found = list(stream)
    assert ids(found) == ids(whole) and [r["input_ids"] for r in found] != [
        row["input_ids"] for row in whole
    ]
    assert ids(stream) == ids(whole)  # and once more, for the next epoch
    few, _ = rows(dataset="a.jsonl", streaming=True, max_rows=5, **more)
    assert ids(few) == ids(whole[:5])


def test_a_run_of_text_is_told_of_text_alone(lemo, files):
    """And of documents that are packed as such."""
    write("book.jsonl", [{"text": TEXT[:8000]}])
    run = ("train", "--model", DEMO / "model", "--output", "out")
    run = (*run, "--tokens", 256, "--lora.r", 2, "--lemo.block_size", 16, "--training.use_cpu")
    run = (*run, "--training.max_steps", 2, "--training.save_strategy", "no", "--overwrite")
    for dataset, packing, row in (
        (
            "a.jsonl",
            "true",
            r"of [2-9] documents packed in a row of 256 tokens \(labels throughout\) about",
        ),
        ("book.jsonl", "false", r"of a 256-token row \(labels throughout\) about"),
    ):
        code, out, err = lemo(*run, "--dataset", dataset, "--data.packing", packing)
        assert code == 0, err
        assert re.search(f"LeMo: {row}", out)
        assert "Kept: runs of 512 tokens by chance, others at each step; always the first" in out
        assert "The last 10% of the steps are dense. " in out and "where labels cover" not in out


def test_packed_documents_of_a_few_tokens_have_labels_on_a_part(files):
    """Their first tokens have none; by the rule that a pass has, and as far as rows are known."""
    write("tiny.jsonl", [{"text": "a"} for _ in range(400)])
    write("mixed.jsonl", [{"text": "a"} for _ in range(200)] + [{"text": TEXT[:2000]}])
    for dataset, more, asks in (
        ("a.jsonl", {"packing": True}, False),
        ("tiny.jsonl", {"packing": True}, True),
        ("mixed.jsonl", {"packing": True}, None),
        ("tiny.jsonl", {"packing": True, "streaming": True}, None),
        ("a.jsonl", {"streaming": True}, False),
    ):
        data = DataSection(dataset, **{"tokens": 64, **more})
        found, _ = text_rows(data, TOKENIZER, 0, False)
        assert labels_cover_a_part(found, data) is asks
        if asks is not None and isinstance(found, list):
            row = {name: torch.tensor([ids]) for name, ids in found[0].items()}
            targets = torch.nn.functional.pad(row["labels"][:, 1:], (0, 1), value=-100)
            facts = BatchFacts(8, (1, 64), torch.device("cpu"), targets=targets)
            assert bool(facts.asks) is asks


def test_weights(files):
    """Documents are drawn in these shares, others by another seed, until one set is used up."""
    share = {}
    for weights in ([1.0, 3.0], [3.0, 1.0]):
        found, _ = rows(dataset=["a.jsonl", "b.jsonl"], weights=weights, min_tokens=8)
        texts = [TOKENIZER.decode(row["input_ids"]) for row in found]
        first, second = (sum(t.startswith(x) for t in texts) for x in ("first", "second"))
        assert max(first, second) == len(files)  # the larger share, each of its documents once
        share[weights[0]] = first / (first + second)
    assert 0.1 < share[1.0] < 0.4 < 0.6 < share[3.0] < 0.9


def test_a_share_is_the_end(files):
    whole, _ = rows(dataset="a.jsonl")
    train, heldout = rows(dataset="a.jsonl", eval_share=0.1)
    assert train + heldout == whole and len(heldout) == round(len(whole) / 10)
    _, few = rows(dataset="a.jsonl", eval_share=0.1, max_eval_rows=2)
    assert few == heldout[:2]
    with pytest.raises(ValueError, match="eval_share=0.5 of 1 rows leaves no row to train on"):
        rows(dataset="a.jsonl", eval_share=0.5, max_rows=1)


def test_a_split_of_the_same_dataset(files):
    train, heldout = rows(dataset="splits", eval_split="test")
    assert train == rows(dataset="splits")[0] and train != heldout
    assert heldout == rows(dataset="splits/test.jsonl")[0]
    both, held = rows(dataset=["splits"] * 2, weights=[1.0, 1.0], eval_split="test")
    assert ids(train)[0] in ids(both) and ids(heldout)[0] in ids(held)
    assert rows(dataset="splits", eval_dataset="splits")[1] == heldout  # "test" unless it is said
