"""Make the quality benchmark's data on a CPU: training sets, test windows, needles.

Training rows, and the haystacks of needles in them, come from the books to train on; windows and
the haystacks of needles to find come from test documents.
"""

import argparse
import json
import lzma
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.quality.data import save
from lemo_hf.eval.needles import NeedleRow, NeedleTemplate, mix_retrieval, needle_rows
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.text_rows import token_rows

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class TrainingSet:
    """Options of `mix_retrieval`: how rows are made from books.

    Attributes:
        tokens: Of a row, as a part of the context the model is extended to: 1 / ``part``.
        share: Of rows with retrieval; None takes the command line's.
        every: Tokens for each line that tells a value; a row has at least one line.
        asked: Share of the lines that are asked for, at least one.
        answer_only: Only the asked values are labels.
        digits: Of a value.
    """

    part: int = 1
    share: float | None = None
    every: int = 256
    asked: float = 1.0
    answer_only: bool = False
    digits: int = 7


SETS = {
    "books": TrainingSet(share=0.0),
    "few-lines": TrainingSet(every=2048, asked=0.25),
    "many-lines": TrainingSet(),
    "many-lines-4-digits": TrainingSet(digits=4),
    "many-lines-half": TrainingSet(part=2),
    "many-lines-quarter": TrainingSet(part=4),
    "answers": TrainingSet(share=1.0, every=1024, asked=0.5, answer_only=True),
    "many-answers": TrainingSet(share=1.0, answer_only=True),
    "many-answers-quarter": TrainingSet(part=4, share=1.0, answer_only=True),
}


def read_texts(path: Path) -> list[str]:
    """The documents of a .jsonl.xz (field ``text``), or a .txt, which is one."""
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def training_rows(
    texts: Sequence[str], model: str, tokens: int, how: TrainingSet, max_rows: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids ``[rows, tokens]`` uint16; labelled tokens ``[rows, tokens]`` uint8, None if all are."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    keys = max(1, tokens // how.every)
    ids, labelled = [], []
    for number, text in enumerate(texts):  # book by book: lists of ids are large
        try:
            rows = mix_retrieval(
                [text],
                tokenizer,
                tokens,
                share=how.share,
                keys=keys,
                questions=max(1, round(how.asked * keys)),
                answer_only=how.answer_only,
                template=NeedleTemplate(digits=how.digits),
                seed=number,
                progress=False,
            )
        except ValueError as error:
            if "no document has" not in str(error):
                raise
            continue
        ids += [np.array(row["input_ids"], dtype=np.uint16) for row in rows]
        labelled += [np.array(row["labels"]) != IGNORE_INDEX for row in rows]
        if max_rows is not None and len(ids) >= max_rows:
            break
    if not ids:
        raise ValueError(f"no book has {tokens} tokens: use longer ones, or fewer --tokens.")
    marks = np.stack(labelled[:max_rows]).astype(np.uint8)
    return np.stack(ids[:max_rows]), None if marks.all() else marks


def windows(texts: Sequence[str], tokenizer, tokens: int, count: int) -> np.ndarray:
    """``[count or fewer, tokens]`` uint16: all texts' first windows, then their second."""

    def of_text(text: str) -> Iterator[list[int]]:
        try:
            rows = token_rows([text], tokenizer, tokens, max_rows=count, progress=False)
        except ValueError:  # a short text
            return iter(())
        return (row["input_ids"] for row in rows)

    found = chain.from_iterable(zip_longest(*map(of_text, texts)))
    rows = list(islice((row for row in found if row is not None), count))
    if not rows:
        raise ValueError(f"no test text has {tokens} tokens.")
    return np.array(rows, dtype=np.uint16)


def needles(
    texts: Sequence[str], tokenizer, lengths: Sequence[int], samples: int, keys: int, digits: int
) -> list[NeedleRow]:
    """Questions at `DEPTHS`."""
    return needle_rows(
        texts,
        tokenizer,
        lengths=lengths,
        depths=DEPTHS,
        samples=samples,
        keys=keys,
        template=NeedleTemplate(digits=digits),
        progress=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the data go")
    parser.add_argument("--model", required=True, help="directory of the base model")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="books, .jsonl.xz")
    parser.add_argument(
        "--test", nargs="+", required=True, help="NAME=FILE; needles lie in the first"
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--share", type=float, default=0.5, help="of rows with retrieval")
    parser.add_argument("--max-rows", type=int, help="of a training set; default: all")
    parser.add_argument("--windows", type=int, default=24, help="of a kind of test text")
    parser.add_argument("--samples", type=int, default=16, help="needle rows a length and depth")
    parser.add_argument("--keys", type=int, default=4, help="lines in a row, one is asked for")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    sets = {
        name: replace(
            SETS[name], share=args.share if SETS[name].share is None else SETS[name].share
        )
        for name in args.sets
    }
    books = list(chain.from_iterable(map(read_texts, args.train)))
    tests = {
        name: read_texts(Path(file)) for name, _, file in (t.partition("=") for t in args.test)
    }
    with ProcessPoolExecutor(args.processes) as pool:
        parts = {
            name: pool.submit(
                training_rows,
                books,
                args.model,
                args.tokens // how.part,
                how,
                args.max_rows and args.max_rows * how.part,
            )
            for name, how in sets.items()
        }
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        lengths = [args.tokens // 4, args.tokens // 2, args.tokens]
        haystacks = next(iter(tests.values()))
        asked = {
            digits: needles(haystacks, tokenizer, lengths, args.samples, args.keys, digits)
            for digits in sorted({how.digits for how in sets.values()})
        }
        held_out = {
            name: windows(texts, tokenizer, args.tokens, args.windows)
            for name, texts in tests.items()
        }
        train = {name: part.result() for name, part in parts.items()}
    header = {
        "tokens": args.tokens,
        "sets": {
            name: asdict(how) | {"rows": len(train[name][0]), "row_tokens": train[name][0].shape[1]}
            for name, how in sets.items()
        },
        "train": [path.name for path in args.train],
        "test": {name: len(ids) for name, ids in held_out.items()},
        "needles": {"lengths": lengths, "depths": DEPTHS, "samples": args.samples}
        | {"keys": args.keys},
    }
    size = save(args.folder, header, train, held_out, asked)
    print(json.dumps(header["sets"]), f"{size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
