"""Needles in real text: rows that tell a key's value somewhere, and ask for it at the end.

The haystack is real text and the needle's depth is chosen, as in needle in a haystack (Kamradt,
2023); key-value lines and distractor keys are those of single-key and multi-key NIAH in RULER
(arXiv 2404.06654).
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tqdm.auto import tqdm

from lemo_hf.eval.needle_text import NeedleTemplate, Writer, too_short
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class NeedleRow:
    """One question about one haystack.

    Attributes:
        input_ids: Prompt and answer.
        answer_tokens: Number of tokens, at the end, that are the answer.
        depth: Share of the haystack's tokens that should come before the asked line.
        position: Place of that line's first token.
        key, value: Key in the question, and value in the answer.
    """

    input_ids: list[int]
    answer_tokens: int
    depth: float
    position: int
    key: str
    value: str

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self.input_ids[: -self.answer_tokens]

    @property
    def answer_ids(self) -> list[int]:
        """Token ids of the answer."""
        return self.input_ids[-self.answer_tokens :]


def needle_rows(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 8,
    keys: int = 1,
    template: NeedleTemplate | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[NeedleRow]:
    """Questions about lines hidden in real text.

    A row has the tokenizer's BOS token (if it adds one), the introduction, the haystack with its
    needles, the question, and the answer. The haystack is one piece of one document, cut so that
    the row has exactly its length; its last sentence is whole. A needle stands where the nearest
    sentence or paragraph ends (where these are rare, as in code, a line). Rows of one length and
    sample have their haystack from the same place at every depth.

    Args:
        documents: Texts. The first ``samples`` with as many tokens as the longest row are used in
            turn; no more are read.
        tokenizer: Tokenizer of the model; a fast one, which knows the place of each token in a
            text.
        lengths: Numbers of tokens of a whole row.
        depths: Shares of the haystack before the needle, 0 (first) to 1 (last before the question).
        samples: Number of rows for each length and depth.
        keys: Number of lines with a key. One is asked for; the others are distractors anywhere.
        template: Words around keys and values; None: those of `NeedleTemplate`.
        seed: Seed of all that is random. A row depends on it, on its length, depth and sample
            number, and on the documents, not on other rows.
        progress: Whether a progress bar is shown.

    Returns:
        Rows, by length, then depth, then sample.

    Raises:
        ValueError: A number is out of range, a length has no room for the lines and the question,
            no document is long enough, or the tokenizer does not fit.
    """
    _at_least(1, samples=samples, keys=keys)
    if not lengths or not depths:
        raise ValueError(
            f"lengths and depths must not be empty, got {list(lengths)} and {list(depths)}."
        )
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(
                f"a depth is a share of the haystack, 0 (its start) to 1 (its end), got {depth}."
            )
    writer = Writer(tokenizer, template or NeedleTemplate(), keys)
    texts = writer.documents(documents, max(lengths), samples)
    rows = []
    total = len(lengths) * len(depths) * samples
    with tqdm(total=total, desc="needle rows", unit="row", disable=not progress) as bar:
        for length, depth, sample in product(lengths, map(float, depths), range(samples)):
            rng = random.Random(f"{seed} {length} {depth} {sample}")
            needles = writer.needles(rng)
            asked = needles[0]
            room = writer.room(length, needles, [asked])
            text = texts[sample % len(texts)]
            place = random.Random(f"{seed} {length} {sample}")
            last = int(place.choice(text.ends[text.ends >= length]))
            places = [depth, *(rng.random() for _ in needles[1:])]
            ids, position = writer.write(text, last - room, room, needles, places)
            ids += asked.question
            rows.append(
                NeedleRow(ids, asked.answer_tokens, depth, position, asked.key, asked.value)
            )
            bar.update()
    return rows


def mix_retrieval(
    documents: Iterable[str],
    tokenizer: Any,
    tokens: int,
    *,
    share: float = 0.5,
    keys: int = 4,
    questions: int = 1,
    answer_only: bool = False,
    template: NeedleTemplate | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, list[int]]]:
    """Rows to train on, like those of `token_rows`, some of which ask for lines hidden in them.

    Documents are cut into rows one after the other; no row spans two, rests are left out. A row
    with retrieval is written as by `needle_rows`, its needles at random depths.

    Args:
        documents: Texts. No more are read than ``max_rows`` need.
        tokenizer: Tokenizer of the model; a fast one.
        tokens: Length of every row.
        share: Share of the rows with retrieval, drawn row by row, 0 to 1.
        keys: Number of lines with a key in a row with retrieval.
        questions: Number of keys that the row asks for at its end, one after the other.
        answer_only: Whether rows with retrieval have labels on the answers alone (-100 elsewhere);
            other rows keep all labels.
        template: Words around keys and values; None: those of `NeedleTemplate`.
        max_rows: Greatest number of rows; None: all.
        seed: Seed of all that is random.
        progress: Whether a progress bar is shown.

    Returns:
        ``{"input_ids": [...], "labels": [...]}`` a row.

    Raises:
        ValueError: A number is out of range, a row has no room for the lines and the questions, no
            document is long enough, or the tokenizer does not fit.
    """
    _at_least(1, keys=keys, questions=questions, max_rows=max_rows)
    _at_least(2, tokens=tokens)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}.")
    if questions > keys:
        raise ValueError(f"{questions} questions about {keys} keys: set keys={questions} or more.")
    writer = Writer(tokenizer, template or NeedleTemplate(), keys)
    rng = random.Random(seed)
    rows, longest = [], 0
    with tqdm(total=max_rows, desc="training rows", unit="row", disable=not progress) as bar:
        for text in map(writer.document, documents):
            first, longest = 0, max(longest, len(text.ids))
            while True:
                needles = writer.needles(rng) if rng.random() < share else []
                asked = needles[:questions]
                room = writer.room(tokens, needles, asked)
                if first + room > len(text.ids):
                    break
                places = [rng.random() for _ in needles]
                ids, _ = writer.write(text, first, room, needles, places)
                labels = [IGNORE_INDEX] * len(ids) if asked and answer_only else list(ids)
                for needle in asked:
                    ids += needle.question
                    silent = len(needle.question) - needle.answer_tokens if answer_only else 0
                    labels += [IGNORE_INDEX] * silent + needle.question[silent:]
                rows.append({"input_ids": ids, "labels": labels})
                first += room
                bar.update()
                if len(rows) == max_rows:
                    return rows
    if not rows:
        raise ValueError(too_short(tokens, longest))
    return rows


def _at_least(least: int, **numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
