"""Turn the benchmark's texts into token ids: whole books, news reports and their summaries."""

import argparse
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.quality.texts import SPLITS, Documents, Texts

TEST_SHARE = 5  # every fifth report is held out
LONGEST_VOCABULARY = 2**16


def read(path: Path) -> list[dict]:
    """Rows of a .jsonl.xz; a .txt is one row with field ``text``."""
    if path.suffix == ".txt":
        return [{"text": path.read_text(encoding="utf-8")}]
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="where the token file goes")
    add("--model", required=True, help="directory of the base model")
    add("--train", type=Path, required=True, help="books to train on, .jsonl.xz or .txt")
    add("--test", type=Path, required=True, help="held-out books")
    add("--news", type=Path, required=True, help="LongBench's multi_news, .jsonl.xz")
    add("--most", type=int, default=400_000, help="tokens of a book that are used")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if len(tokenizer) > LONGEST_VOCABULARY:
        raise SystemExit(f"ids of {len(tokenizer)} tokens do not fit 16 bits")

    def encode(texts: list[str]) -> Documents:
        return [
            np.array(tokenizer(t, add_special_tokens=False)["input_ids"][: args.most], np.uint16)
            for t in texts
        ]

    books = {split: [row["text"] for row in read(getattr(args, split))] for split in SPLITS}
    news = read(args.news)
    parts = {
        "train": [row for i, row in enumerate(news) if i % TEST_SHARE],
        "test": [row for i, row in enumerate(news) if i % TEST_SHARE == 0],
    }
    texts = Texts(
        books={split: encode(found) for split, found in books.items()},
        reports={s: encode([clean(row["context"]) for row in rows]) for s, rows in parts.items()},
        summaries={
            s: encode([clean(" " + row["answers"][0].strip()) for row in rows])
            for s, rows in parts.items()
        },
        origin={name: getattr(args, name).name for name in ("train", "test", "news")},
    )
    size = texts.save(args.folder)
    tokens = {split: sum(map(len, found)) for split, found in texts.books.items()}
    print(f"{args.folder}: {size / 2**20:.1f} MiB, tokens of books {tokens}")


def clean(text: str) -> str:
    """LongBench's multi_news spells line breaks out."""
    return text.replace(" NEWLINE_CHAR ", "\n").replace("NEWLINE_CHAR", "\n")


if __name__ == "__main__":
    main()
