"""Rows of tokens from what a user has: formats, columns, splits, streaming, cutting."""

import json
import lzma

import pytest
from support.paths import DEMO
from transformers import AutoTokenizer

from lemo_hf.storage.text_rows import load_documents, token_rows

TEXTS = ["one two\nthree", "four", "five six seven"]


class Letters:
    """A tokenizer of one token a character that counts what it was given."""

    def __init__(self, bos=None):
        self.bos_token_id = bos
        self.seen = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.seen += 1
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id else []
        return {"input_ids": start + [ord(letter) for letter in text]}


def write(path, texts=TEXTS, column="text"):
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(lines.encode()))
    elif path.suffix == ".parquet":
        import pandas

        pandas.DataFrame({"id": range(len(texts)), column: texts}).to_parquet(path)
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.xz", "a.parquet"])
def test_files(name, tmp_path):
    assert list(load_documents(write(tmp_path / name))) == TEXTS
    assert list(load_documents(write(tmp_path / name, column="body"), text_column="body")) == TEXTS


def test_several_files_and_text_files(tmp_path):
    paths = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ["last"])]
    assert list(load_documents(paths)) == [*TEXTS, "last"]
    for name, text in zip(("x.txt", "y.txt"), TEXTS, strict=False):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / "x.txt"), str(tmp_path / "y.txt")]
    assert list(load_documents(files)) == TEXTS[:2]  # a file is a document, not each of its lines


def test_a_directory_with_splits(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}-0.jsonl", [split])
    assert list(load_documents(tmp_path, "test")) == ["test"]
    assert list(load_documents(tmp_path)) == ["train"]
    with pytest.raises(ValueError, match="split 'valid'.*train"):
        list(load_documents(tmp_path, "valid"))
    assert len(list(load_documents(DEMO / "text"))) == 3


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no column 'text', its columns are: id, body"):
        list(load_documents(write(tmp_path / "a.jsonl", column="body")))
    with pytest.raises(ValueError, match="column 'id' must hold text, got int"):
        list(load_documents(tmp_path / "a.jsonl", text_column="id"))
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.jsonl"):
        load_documents(tmp_path / "missing.jsonl")
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"one of .json, .jsonl, .txt, .parquet, got .*csv"):
        load_documents(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="the same format"):
        load_documents([tmp_path / "a.jsonl", write(tmp_path / "b.parquet")])
    with pytest.raises(ValueError, match="several datasets must be files"):
        load_documents([tmp_path / "a.jsonl", tmp_path])


def cut(texts, tokens, bos=None, **options):
    rows = token_rows(texts, Letters(bos), tokens, progress=False, **options)
    assert all(row["labels"] == row["input_ids"] for row in rows)
    return [[chr(i) if i > 9 else i for i in row["input_ids"]] for row in rows]


def test_no_row_spans_two_documents():
    assert cut(["abcde", "f", "ghi"], 2) == [["a", "b"], ["c", "d"], ["g", "h"]]
    assert cut(["abcde", "f"], 3, min_tokens=2) == [["a", "b", "c"], ["d", "e"]]
    assert cut(["abcde", "f"], 3, min_tokens=1) == [["a", "b", "c"], ["d", "e"], ["f"]]


def test_every_row_begins_with_the_tokenizers_bos():
    assert cut(["abcde"], 3, bos=1) == [[1, "a", "b"], [1, "c", "d"]]


def test_no_more_is_tokenised_than_asked_for():
    def documents():
        while True:
            yield "abcdef"

    tokenizer = Letters()
    assert len(token_rows(documents(), tokenizer, 2, max_rows=7, progress=False)) == 7
    assert tokenizer.seen == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 9}, "no document has 9 tokens: the longest has 5"),
        ({"tokens": 9, "min_tokens": 7}, "no document has 7 tokens"),
        ({"tokens": 1}, "tokens must be at least 2, got 1"),
        ({"tokens": 2, "max_rows": 0}, "max_rows must be at least 1, got 0"),
    ],
)
def test_rows_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        token_rows(["abcde", "f"], Letters(), progress=False, **options)


def test_a_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "text" / "train-alice-adams.txt").read_text(encoding="utf-8")[:5000]
    rows = token_rows([text], tokenizer, 64, progress=False)
    joined = tokenizer.decode([i for row in rows for i in row["input_ids"]])
    assert text.startswith(joined) and len(joined) > 4000
