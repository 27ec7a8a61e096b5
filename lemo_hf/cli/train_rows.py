"""Rows of tokens for `lemo train`, as the section ``data`` asks for them."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from tqdm.auto import tqdm

from lemo_hf.cli.train_config import DataSection
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.storage.text_rows import load_documents, start_tokens, token_rows


def train_rows(data: DataSection, tokenizer: Any, progress: bool) -> list[dict[str, list[int]]]:
    """Rows to train on.

    Raises:
        OSError, ValueError: The dataset cannot be read, or no document is long enough.
    """
    documents = load_documents(data.dataset, data.split, data.text_column)
    if data.packing:
        return packed_rows(documents, tokenizer, data.tokens, data.max_rows, progress)
    return token_rows(
        documents,
        tokenizer,
        data.tokens,
        max_rows=data.max_rows,
        min_tokens=data.min_tokens,
        progress=progress,
    )


def eval_rows(data: DataSection, tokenizer: Any, progress: bool) -> list[dict] | None:
    """Rows to evaluate on, one document each, or None."""
    if data.eval_dataset is None:
        return None
    documents = load_documents(data.eval_dataset, data.eval_split, data.text_column)
    return token_rows(
        documents, tokenizer, data.tokens, max_rows=data.max_eval_rows, progress=progress
    )


def packed_rows(
    documents: Iterable[str],
    tokenizer: Any,
    tokens: int,
    max_rows: int | None = None,
    progress: bool = True,
) -> list[dict[str, list[int]]]:
    """Documents end to end in rows of ``tokens`` tokens; what is left over is dropped.

    Positions start anew with each document and after each cut, by which attention is kept inside
    it. The first token of each is no label: it would be predicted from another document.

    Returns:
        ``{"input_ids": [...], "labels": [...], "position_ids": [...]}`` a row.

    Raises:
        ValueError: All documents together are shorter than a row.
    """
    start = start_tokens(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows: list[dict[str, list[int]]] = []
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    with tqdm(total=max_rows, desc="rows of tokens", disable=not progress) as bar:
        for text in documents:
            if len(rows) == max_rows:
                return rows
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            rest = iter([*start, *ids, *end])
            while part := list(islice(rest, tokens - len(row["input_ids"]))):
                row["input_ids"] += part
                row["labels"] += [IGNORE_INDEX, *part[1:]]
                row["position_ids"] += range(len(part))
                if len(row["input_ids"]) == tokens:
                    rows.append(row)
                    row = {name: [] for name in row}
                    bar.update()
                    if len(rows) == max_rows:
                        return rows
    if not rows:
        raise ValueError(
            f"the documents have {len(row['input_ids'])} tokens in all, a row has {tokens}: ask "
            "for shorter rows, or use more text."
        )
    return rows


def collator(tokenizer: Any) -> Any:
    """Pads rows of different lengths, labels too."""
    from transformers import DataCollatorForSeq2Seq, default_data_collator

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if len({len(row["input_ids"]) for row in rows}) == 1:
            return default_data_collator(rows)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return DataCollatorForSeq2Seq(tokenizer)(rows)

    return collate
