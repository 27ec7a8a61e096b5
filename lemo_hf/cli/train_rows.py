"""Rows of tokens from plain text for `lemo train`, as the section ``data`` asks for them."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from lemo_hf.batch.facts import covers_a_part
from lemo_hf.cli.train_sections import DataSection
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.storage.tables import interleaved, load_table
from lemo_hf.storage.text_rows import (
    collected,
    cut_rows,
    load_documents,
    named_rows,
    start_tokens,
    texts_of,
)

BUFFER = 256  # rows among which a stream is shuffled


def text_rows(
    data: DataSection, tokenizer: Any, seed: int, progress: bool
) -> tuple[Any, list[dict] | None]:
    """Rows to train on, as a list or a stream, and rows to evaluate on, of one document each.

    Raises:
        OSError, ValueError: A dataset cannot be read, or no document is long enough.
    """
    if data.streaming:
        from datasets import IterableDataset

        asked = {"data": data, "tokenizer": tokenizer, "seed": seed}
        stream: Any = IterableDataset.from_generator(_limited, gen_kwargs=asked)
        rows = stream.shuffle(seed=seed, buffer_size=BUFFER)
    else:
        rows = collected(_rows(data, tokenizer, seed), data.max_rows, progress)
    heldout = data.heldout
    if heldout is not None:
        found = _rows(heldout, tokenizer, seed)
        return rows, collected(found, heldout.max_rows, progress)
    if data.eval_share is None:
        return rows, None
    # Neighbours may be of one document: those held out are the last ones, in one piece.
    held = max(1, round(data.eval_share * len(rows)))
    if held == len(rows):
        raise ValueError(
            f"eval_share={data.eval_share:g} of {held} rows leaves no row to train on."
        )
    return rows[:-held], rows[-held:][: data.max_eval_rows]


def _limited(data: DataSection, tokenizer: Any, seed: int) -> Iterator[dict[str, list[int]]]:
    yield from islice(_rows(data, tokenizer, seed), data.max_rows)


def _rows(data: DataSection, tokenizer: Any, seed: int) -> Iterator[dict[str, list[int]]]:
    column = data.text_column or "text"
    if data.weights is None:
        documents = load_documents(data.dataset, data.split, column)
    else:
        tables = [load_table(name, data.split).select_columns([column]) for name in data.dataset]
        mixed = interleaved(tables, data.weights, seed)
        documents = texts_of(named_rows(", ".join(data.dataset), mixed), column)
    name = data.dataset if isinstance(data.dataset, str) else ", ".join(data.dataset)
    if data.packing:
        return packed_rows(documents, tokenizer, data.tokens, name)
    return cut_rows(documents, tokenizer, data.tokens, data.min_tokens, name)


def packed_rows(
    documents: Iterable[str], tokenizer: Any, tokens: int, name: str = ""
) -> Iterator[dict[str, list[int]]]:
    """Documents one after the other in rows of ``tokens`` tokens; the rest is dropped.

    Positions start anew with each document and after each cut, which keeps attention inside a
    document. The first token of each is no label: it would be predicted from another document.

    Returns:
        ``{"input_ids": [...], "labels": [...], "position_ids": [...]}`` a row.

    Raises:
        ValueError: All documents together are shorter than a row.
    """
    start = start_tokens(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    made = 0
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rest = iter([*start, *ids, *end])
        while part := list(islice(rest, tokens - len(row["input_ids"]))):
            row["input_ids"] += part
            row["labels"] += [IGNORE_INDEX, *part[1:]]
            row["position_ids"] += range(len(part))
            if len(row["input_ids"]) == tokens:
                yield row
                row, made = {name: [] for name in row}, made + 1
    if not made:
        raise ValueError(
            f"the documents {f'of {name} ' if name else ''}have {len(row['input_ids'])} tokens in "
            f"all, fewer than a row of {tokens}: ask for shorter rows, or use more text."
        )


def labels_cover_a_part(rows: Any, data: DataSection) -> bool | None:
    """Whether labels cover only a part of each row, as of tiny documents that are packed: their
    first tokens have none. None: of a stream it is not known, or it differs from row to row."""
    if not data.packing:
        return False
    if not isinstance(rows, list):
        return None
    tokens = data.tokens
    found = {covers_a_part(tokens - row["labels"].count(IGNORE_INDEX), tokens) for row in rows}
    return found.pop() if len(found) == 1 else None


def collator(tokenizer: Any) -> Any:
    """A collator that pads rows of different lengths, and their labels."""
    from transformers import DataCollatorForSeq2Seq, default_data_collator

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if len({len(row["input_ids"]) for row in rows}) == 1:
            return default_data_collator(rows)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return DataCollatorForSeq2Seq(tokenizer)(rows)

    return collate
