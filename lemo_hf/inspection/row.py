"""A text in tokens, as a trainer would get it, with or without a question at its end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class Passage:
    """A part of the text that the user marked.

    Attributes:
        text: Text of the part.
        first: Index of its first token.
        last: Index of its last token.
    """

    text: str
    first: int
    last: int


@dataclass(frozen=True)
class TextRow:
    """A text in tokens, as a trainer would get it.

    Attributes:
        input_ids: Token ids, ``[T]``.
        labels: Labels, ``[T]``: the ids; with a question, `IGNORE_INDEX` outside the answer.
        question: Question at the end of the text, or None.
        answer: Answer to the question, or None.
        passages: Marked passages.
    """

    input_ids: list[int]
    labels: list[int]
    question: str | None = None
    answer: str | None = None
    passages: tuple[Passage, ...] = ()


def text_row(
    tokenizer: Any,
    text: str,
    tokens: int,
    question: str | None = None,
    answer: str | None = None,
    needles: Sequence[str] = (),
) -> TextRow:
    """The beginning of a text as a row, with or without a question at its end.

    Args:
        tokenizer: Tokenizer of the model.
        text: Whole text.
        tokens: Greatest number of tokens of the row.
        question: Question, which follows the text as a paragraph of its own.
        answer: Answer, which follows the question. Only its tokens are labelled.
        needles: Parts of the text to mark, copied from it; white space may differ.

    Raises:
        ValueError: A question comes without its answer or the other way round, or does not fit, or
            a needle is not in the row.
    """
    if (question is None) != (answer is None):
        raise ValueError(
            f"question {question!r} and answer {answer!r}: give both, or neither to label the "
            "whole text."
        )
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    asked: list[int] = []
    wanted: list[int] = []
    if question is not None and answer is not None:
        asked = tokenizer(f"\n\n{question}", add_special_tokens=False)["input_ids"]
        wanted = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        if len(asked) + len(wanted) >= tokens:
            raise ValueError(
                f"question and answer have {len(asked) + len(wanted)} tokens, more than fit a row "
                f"of {tokens}: give a longer row."
            )
    ids = ids[: tokens - len(asked) - len(wanted)]
    passages = tuple(_find(tokenizer, text, needle, len(ids)) for needle in needles)
    row = [*ids, *asked, *wanted]
    labels = row if question is None else [*[IGNORE_INDEX] * (len(ids) + len(asked)), *wanted]
    return TextRow(row, list(labels), question, answer, passages)


def _find(tokenizer: Any, text: str, needle: str, tokens: int) -> Passage:
    """The first place of ``needle`` in a text of which a row holds ``tokens``."""
    found = re.search(r"\s+".join(map(re.escape, needle.split())), text) if needle.split() else None
    if found is None:
        raise ValueError(f"{needle!r} is not in the text: copy some words of it.")
    # Counted in what stands before, which any tokenizer can; a word cut there may be a token more.
    # White space before a word is most often a part of the word's token.
    starts, ends = found.span()
    first, end = (
        len(tokenizer(before, verbose=False)["input_ids"])
        for before in (text[:starts].rstrip(), text[:ends])
    )
    if end > tokens:
        raise ValueError(
            f"{needle!r} ends at token {end:,} of the text, and the row has only the first "
            f"{tokens:,}: give a longer row, or other words."
        )
    return Passage(" ".join(found.group().split()), first, max(first, end - 1))
