"""Rows of tokens, made from a user's text, one document after the other."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from tqdm.auto import tqdm

from lemo_hf.shown import nearest, shortened
from lemo_hf.storage.json_lines import Row, read_file
from lemo_hf.storage.tables import Names, are_files, load_table, named, paths_of, suffix_of, told


def load_examples(dataset: Names, split: str = "train") -> Iterator[Row]:
    """Load examples of a dataset, streamed: only what is needed is read or downloaded.

    Arguments and errors are those of `load_table`.

    Returns:
        The examples in the dataset's order, by column; a .txt file has one column, ``"text"``.
    """
    paths = paths_of(dataset)
    name = named(paths, split)
    if are_files(paths):  # each of its own, so that a message names the one
        return _some(chain.from_iterable(map(_file_examples, paths)), name)
    return _some(named_rows(name, load_table(paths, split)), name)


def load_documents(
    dataset: Names, split: str = "train", text_column: str = "text"
) -> Iterator[str]:
    """Load the texts of a dataset; arguments and errors as of `load_examples`.

    Args:
        dataset: Hub id, directory, or files.
        split: Split of a Hub dataset.
        text_column: Column of the text.

    Raises:
        ValueError: There is no such column (the message lists the columns), or a row of it is not
            text.
    """
    return texts_of(load_examples(dataset, split), text_column)


def check_documents(dataset: Names, split: str = "train", text_column: str = "text") -> None:
    """Read the first of `load_documents`, so that its errors come before a model is loaded."""
    next(load_documents(dataset, split, text_column))


def texts_of(rows: Iterable[Row], column: str) -> Iterator[str]:
    """Texts of a column, checked as those of `load_documents` are."""
    return (_text(row, column, row.where) for row in rows)


def labelled_rows(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    tokens: int,
    max_rows: int | None = None,
    progress: bool = False,
) -> list[dict[str, list[int]]]:
    """Rows of which a part is labelled, without those longer than ``tokens``.

    Args:
        examples: Mappings with ``input_ids`` and ``labels`` (-100: none), or with the texts
            ``prompt`` and ``completion``; the completion is labelled and gets the EOS token at its
            end.
        tokenizer: Tokenizer of the model.
        tokens: Number of tokens of the longest row.
        max_rows: Greatest number of rows; None: all.
        progress: Whether a progress bar is shown.

    Returns:
        ``{"input_ids": [...], "labels": [...]}`` a row.

    Raises:
        ValueError: No row is short enough, or one has other columns or values.
    """
    found = _labelled(examples, tokenizer, tokens)
    rows = collected(found, max_rows, progress)
    if not rows:
        raise ValueError(f"no row has at most {tokens} tokens: ask for longer rows.")
    return rows


def _labelled(
    examples: Iterable[Mapping[str, Any]], tokenizer: Any, tokens: int
) -> Iterator[dict[str, list[int]]]:
    start = start_tokens(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for number, example in enumerate(examples, 1):
        where = getattr(example, "where", f"row {number}")
        if "input_ids" in example:
            ids, labels = (_token_ids(example, name, where) for name in ("input_ids", "labels"))
            if len(ids) != len(labels):
                raise ValueError(f"{where} has {len(ids)} input_ids and {len(labels)} labels.")
        else:
            texts = [_text(example, name, where) for name in ("prompt", "completion")]
            prompt, completion = (
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                for text in texts
            )
            ids = [*start, *prompt, *completion, *end]
            labels = [-100] * (len(start) + len(prompt)) + ids[len(start) + len(prompt) :]
        if len(ids) <= tokens:
            yield {"input_ids": ids, "labels": labels}


def token_rows(
    documents: Iterable[str],
    tokenizer: Any,
    tokens: int,
    *,
    max_rows: int | None = None,
    min_tokens: int | None = None,
    progress: bool = True,
    name: str = "",
) -> list[dict[str, list[int]]]:
    """The rows of `cut_rows` in a list. Errors are those of `cut_rows` and `collected`.

    Args:
        documents: Texts. No more are tokenised than ``max_rows`` need.
        tokenizer: Tokenizer of the model.
        tokens: Length of a row.
        max_rows: Greatest number of rows; None: all.
        min_tokens: Least number of tokens for which the rest of a document is a shorter row; None:
            the rest is dropped.
        progress: Whether a progress bar is shown.
        name: Name of the dataset, for messages.
    """
    return collected(cut_rows(documents, tokenizer, tokens, min_tokens, name), max_rows, progress)


def cut_rows(
    documents: Iterable[str],
    tokenizer: Any,
    tokens: int,
    min_tokens: int | None = None,
    name: str = "",
) -> Iterator[dict[str, list[int]]]:
    """Cut each document into rows of ``tokens`` tokens; no row spans two documents.

    Every row begins with the tokenizer's BOS token, if it adds one, which counts among the
    ``tokens``. No other special token is added.

    Args:
        documents: Texts.
        tokenizer: Tokenizer of the model.
        tokens: Length of a row.
        min_tokens: Least number of tokens for which the rest of a document is a shorter row; None:
            the rest is dropped.
        name: Name of the dataset, for messages.

    Returns:
        ``{"input_ids": [...], "labels": [...]}`` for each row, with the ids as labels.

    Raises:
        ValueError: A number is too small, or no document is long enough.
    """
    for key, value, least in (("tokens", tokens, 2), ("min_tokens", min_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}.")
    min_tokens = min(tokens, tokens if min_tokens is None else min_tokens)
    start = start_tokens(tokenizer)
    longest = 0
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids) + len(start))
        for first in range(0, len(ids), tokens - len(start)):
            row = start + ids[first : first + tokens - len(start)]
            if len(row) >= min_tokens:
                yield {"input_ids": row, "labels": list(row)}
    if longest < min_tokens:
        raise ValueError(
            f"no document {f'of {name} ' if name else ''}has {min_tokens} tokens: the longest has "
            f"{longest}. Ask for shorter rows, or use longer documents."
        )


def collected(
    rows: Iterable[dict[str, list[int]]], max_rows: int | None, progress: bool
) -> list[dict[str, list[int]]]:
    """The first ``max_rows`` of ``rows``, or all of them, with a progress bar.

    Raises:
        ValueError: ``max_rows`` is too small.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}.")
    found = islice(rows, max_rows)
    return list(tqdm(found, total=max_rows, desc="rows of tokens", disable=not progress))


def start_tokens(tokenizer: Any) -> list[int]:
    """Tokens with which the tokenizer begins a text: its BOS token, if it adds one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _file_examples(path: str) -> Iterator[Row]:
    if suffix_of(path) == ".jsonl" and not path.endswith(".zst"):  # which Python cannot read
        return read_file(path)
    return named_rows(path, load_table(path))


def named_rows(name: str, stream: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Rows of a table, each of which knows its place."""
    with told(name):
        for number, example in enumerate(stream, 1):
            row = Row(example)
            row.where = f"{name}, row {number}"
            yield row


def _some(rows: Iterator[Row], name: str) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{name} has no row.")
    yield first
    yield from rows


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise ValueError(
            f"{where} has no column {column!r}, its columns are: "
            f"{shortened(', '.join(row))}{nearest(column, row)}"
        )
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: column {column!r} must hold text, got {type(text).__name__}: leave the row "
            "out, or name another column."
        )
    return text


def _token_ids(row: Mapping[str, Any], column: str, where: str) -> list[int]:
    values = row.get(column)
    if not isinstance(values, Sequence) or not all(isinstance(value, int) for value in values):
        raise ValueError(f"{where}: column {column!r} must be a list of token ids.")
    return list(values)
