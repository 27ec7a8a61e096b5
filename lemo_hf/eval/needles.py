"""Needles in real text: rows that tell a key's value somewhere and ask for it at the end.

The haystack is real text and the needle's depth is chosen, as in needle in a haystack (Kamradt,
2023); key-value lines and distractor keys are those of single-key and multi-key NIAH in RULER
(arXiv 2404.06654).
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.text_rows import start_tokens

# Keys are an adjective and a noun.
ADJECTIVES = """
amber ancient bitter brave bright broken calm clever cold crimson curious distant early eager faint
fierce frozen gentle golden hollow humble idle ivory jolly lonely lucky mellow narrow noble pale
patient proud quiet rapid rustic scarlet silent silver velvet wooden
"""
NOUNS = """
anchor badger barrel basket beacon bridge candle canyon castle cedar comet copper desert dragon
falcon feather forest garden hammer harbor island jungle kettle ladder lantern marble meadow mirror
needle orchard parrot pebble pepper ribbon saddle tunnel valley violin walnut window
"""
# Where a sentence or a paragraph has ended, the white space behind it included in group 1; an
# initial or a title ends none.
SENTENCE_END = re.compile(
    r"(?:(?:(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!\bMrs)\.|[!?])[.!?]*[\"'”’)\]]*(?=\s)"
    r"|[。！？]+[”’」』）]*|\n[^\S\n]*(?=\n))(\s*)"
)
LINE_END = re.compile(r"(?=\n)(\s+)")
# Text with fewer ends than one in so many tokens (code, tables) is taken apart in a finer way.
RARE = 64


@dataclass(frozen=True)
class NeedleTemplate:
    """The words around keys and values; ``{key}`` and ``{value}`` stand for them.

    A key is two words (``"amber-falcon"``), a value a random number without a leading zero.

    Attributes:
        needle: A line that tells a value; inserted as a line of its own.
        question: The last line. It ends with the value: all before it is the prompt.
        introduction: Before the haystack; with ``question``, the place for a chat format.
        digits: Digits of a value. Who knows no more than that guesses it with
            ``-log(9 * 10 ** (digits - 1))`` nats, -16.0 for 7 digits.

    Raises:
        ValueError: A placeholder is missing or misplaced, or a value could be guessed.
    """

    needle: str = "The special magic number for {key} is: {value}."
    question: str = (
        "What is the special magic number for {key}? The special magic number for {key} is: {value}"
    )
    introduction: str = ""
    digits: int = 7

    def __post_init__(self) -> None:
        for name in ("needle", "question"):
            text = getattr(self, name)
            for part in ("{key}", "{value}"):
                if part not in text:
                    raise ValueError(f"{name} must contain {part}, got {text!r}.")
        if self.question.find("{value}") != len(self.question) - len("{value}"):
            raise ValueError(
                f"question must end with {{value}} and hold it once, got {self.question!r}: the "
                "model is asked for what comes last."
            )
        if self.digits < 4:
            raise ValueError(f"digits must be at least 4, got {self.digits}.")


@dataclass(frozen=True)
class NeedleRow:
    """One question about one haystack.

    Attributes:
        input_ids: Prompt and answer.
        answer_tokens: Number of those that, at the end, are the answer.
        depth: Share of the haystack's tokens that were to come before the asked line.
        position: Place of its first token.
        key, value: What is asked, and what the answer says.
    """

    input_ids: list[int]
    answer_tokens: int
    depth: float
    position: int
    key: str
    value: str

    @property
    def prompt_ids(self) -> list[int]:
        """What a model is to go on from."""
        return self.input_ids[: -self.answer_tokens]

    @property
    def answer_ids(self) -> list[int]:
        """What it is to go on with."""
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

    A row is: what the tokenizer begins a text with (BOS, if it adds one), the introduction, the
    haystack with its needles, the question, the answer. The haystack is one piece of one document,
    cut so that the row has exactly its length; its last sentence is whole. A needle stands where
    the nearest sentence or paragraph ends (where these are rare, as in code, a line). Rows of one
    length and sample have their haystack from the same place at every depth.

    Args:
        documents: Texts. The first ``samples`` that have as many tokens as the longest row are
            used, in turn; no more are read.
        tokenizer: Tokenizer of the model; one that knows the place of each token in a text
            ("fast").
        lengths: Tokens of a row, all included.
        depths: Share of the haystack before the needle, 0 (first) to 1 (last before the question).
        samples: Rows for each length and depth.
        keys: Lines with a key each. One is asked for; the others, distractors, lie anywhere.
        template: The words; None takes those of `NeedleTemplate`.
        seed: Seed of all that is random. A row depends on it, its length, depth and sample number,
            and on the documents, not on what other rows are asked for.
        progress: Whether a progress bar is shown.

    Returns:
        Rows, by length, then depth, then sample.

    Raises:
        ValueError: A number is out of range, a length has no room for the lines and the question,
            no document is long enough, or the tokenizer does not fit.
    """
    _at_least(1, samples=samples, keys=keys)
    if not lengths or not depths:
        raise ValueError(f"name lengths and depths, got {list(lengths)} and {list(depths)}.")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(
                f"a depth is a share of the haystack, 0 (its start) to 1 (its end), got {depth}."
            )
    writer = _Writer(tokenizer, template or NeedleTemplate(), keys)
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
    """Rows to train on, like those of `token_rows`; some of them ask for lines hidden in them.

    Documents are cut into rows one after the other; no row spans two, rests are left out. A row
    with retrieval is written as by `needle_rows`, its needles at random depths.

    Args:
        documents: Texts. No more of them are read than ``max_rows`` need.
        tokenizer: Tokenizer of the model; "fast".
        tokens: Length of every row.
        share: Share of the rows that are to have retrieval, drawn row by row.
        keys: Lines with a key each, in a row with retrieval.
        questions: Number of them that the row asks for at its end, one question after the other.
        answer_only: Rows with retrieval have labels on the answers alone (-100 elsewhere); rows
            without it keep all labels.
        template: The words; None takes those of `NeedleTemplate`.
        max_rows: Most rows that are made; None takes all.
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
    writer = _Writer(tokenizer, template or NeedleTemplate(), keys)
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
        raise ValueError(_too_short(tokens, longest))
    return rows


@dataclass(frozen=True)
class _Document:
    """A text in tokens; after ``ends`` of them (ascending, the last is all) a needle may stand."""

    ids: list[int]
    ends: np.ndarray


@dataclass(frozen=True)
class _Needle:
    """A key, its value, its line, and the question for it with the answer at the end, in tokens."""

    key: str
    value: str
    line: list[int]
    question: list[int]
    answer_tokens: int


class _Writer:
    """Makes token ids of texts and needles; benchmark and training rows are both its work."""

    def __init__(self, tokenizer: Any, template: NeedleTemplate, keys: int):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell where in a text its tokens are: use the "
                "fast tokenizer of the model (AutoTokenizer gives it where there is one)."
            )
        words = [f"{adj}-{noun}" for adj in ADJECTIVES.split() for noun in NOUNS.split()]
        if keys > len(words):
            raise ValueError(f"there are {len(words):,} different keys, got keys={keys:,}.")
        self.tokenizer, self.template = tokenizer, template
        self.words, self.keys = words, keys
        self.bos = start_tokens(tokenizer)
        self.start = self.bos + self._encode(template.introduction)[0]

    def _encode(self, text: str) -> tuple[list[int], np.ndarray]:
        """Tokens, and where in the text each of them ends."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        return encoded["input_ids"], ends

    def documents(self, texts: Iterable[str], tokens: int, count: int) -> list[_Document]:
        """The first ``count`` that have so many tokens, or those that there are."""
        found, longest = [], 0
        for document in map(self.document, texts):
            longest = max(longest, len(document.ids))
            if len(document.ids) >= tokens:
                found.append(document)
            if len(found) == count:
                break
        if not found:
            raise ValueError(_too_short(tokens, longest))
        return found

    def document(self, text: str) -> _Document:
        """A text, and where needles may stand in it."""
        ids, ends = self._encode(text)
        for pattern in (SENTENCE_END, LINE_END):
            places = _ends(pattern, text, ends)
            if len(places) * RARE >= len(ids):
                break
        else:
            places = np.arange(1, len(ids) + 1)
        return _Document(ids, np.union1d(places, [len(ids)]))

    def needles(self, rng: random.Random) -> list[_Needle]:
        """All needles of a row, no key and no value twice."""
        least = 10 ** (self.template.digits - 1)
        words = rng.sample(self.words, self.keys)
        values = rng.sample(range(least, 10 * least), self.keys)
        return [self._needle(key, str(value)) for key, value in zip(words, values, strict=True)]

    def _needle(self, key: str, value: str) -> _Needle:
        line, question = (
            text.replace("{key}", key).replace("{value}", value)
            for text in (f"\n{self.template.needle}\n", f"\n{self.template.question}")
        )
        ids, ends = self._encode(question)
        answer_tokens = int((ends > len(question) - len(value)).sum())
        if answer_tokens < 2:
            raise ValueError(
                f"{value!r} is a single token of this tokenizer: give the NeedleTemplate more "
                f"digits than {self.template.digits}."
            )
        return _Needle(key, value, self._encode(line)[0], ids, answer_tokens)

    def room(self, tokens: int, needles: list[_Needle], asked: list[_Needle]) -> int:
        """Tokens that are left for the haystack."""
        start = self.start if needles else self.bos
        taken = sum(len(needle.line) for needle in needles)
        taken += sum(len(needle.question) for needle in asked) + len(start)
        if taken >= tokens:
            raise ValueError(
                f"{tokens} tokens are too few: {len(needles)} key lines, question and answer alone "
                f"take {taken}. Ask for longer rows, or fewer keys."
            )
        return tokens - taken

    def write(
        self,
        document: _Document,
        first: int,
        room: int,
        needles: list[_Needle],
        depths: list[float],
    ) -> tuple[list[int], int]:
        """The row up to its question, and where in it the first needle begins."""
        inner = document.ends[(document.ends > first) & (document.ends < first + room)]
        places = np.array([0, *(inner - first), room])
        nearest = [int(places[np.abs(places - depth * room).argmin()]) for depth in depths]
        row, position, done = list(self.start if needles else self.bos), 0, 0
        for i in sorted(range(len(needles)), key=nearest.__getitem__):
            row += document.ids[first + done : first + nearest[i]]
            position = position if i else len(row)
            row += needles[i].line
            done = nearest[i]
        return row + document.ids[first + done : first + room], position


def _ends(pattern: re.Pattern, text: str, ends: np.ndarray) -> np.ndarray:
    """Counts of tokens after which the text has come to a match: the last token that ends in it."""
    spans = [match.span(1) for match in pattern.finditer(text)]
    if not spans:
        return np.empty(0, dtype=np.int64)
    first, last = np.array(spans).T
    count = np.searchsorted(ends, last, side="right")
    return np.unique(count[(count > 0) & (ends[count - 1] >= first)])


def _at_least(least: int, **numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def _too_short(tokens: int, longest: int) -> str:
    return (
        f"no document has {tokens} tokens: the longest has {longest}. Ask for shorter rows, or use "
        "longer documents."
    )
