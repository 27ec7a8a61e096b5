"""The words of needles, and token rows with needles written into texts."""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lemo_hf.storage.text_rows import start_tokens

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
        needle: Line that tells a value; inserted as a line of its own.
        question: Last line of the row. It ends with the value; all before the value is the prompt.
        introduction: Text before the haystack; this and ``question`` may have a chat format.
        digits: Number of digits of a value. A guess by this alone has
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
                f"question must end with {{value}} and contain it once, got {self.question!r}: "
                "the model is asked for its end."
            )
        if self.digits < 4:
            raise ValueError(f"digits must be at least 4, got {self.digits}.")


@dataclass(frozen=True)
class Document:
    """A text in tokens. ``ends`` are ascending numbers of tokens after which a needle may stand;
    the last is all."""

    ids: list[int]
    ends: np.ndarray


@dataclass(frozen=True)
class Needle:
    """A key, its value, and in tokens its line and its question, which ends with the answer."""

    key: str
    value: str
    line: list[int]
    question: list[int]
    answer_tokens: int


class Writer:
    """Makes token ids of texts and needles, for benchmark and training rows."""

    def __init__(self, tokenizer: Any, template: NeedleTemplate, keys: int):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no places of tokens in the text: use the "
                "model's fast tokenizer (AutoTokenizer loads it if there is one)."
            )
        words = [f"{adj}-{noun}" for adj in ADJECTIVES.split() for noun in NOUNS.split()]
        if keys > len(words):
            raise ValueError(f"keys={keys:,} is too many: there are {len(words):,} different keys.")
        self.tokenizer, self.template = tokenizer, template
        self.words, self.keys = words, keys
        self.bos = start_tokens(tokenizer)
        self.start = self.bos + self._encode(template.introduction)[0]

    def _encode(self, text: str) -> tuple[list[int], np.ndarray]:
        """Tokens, and the place in the text where each of them ends."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        return encoded["input_ids"], ends

    def documents(self, texts: Iterable[str], tokens: int, count: int) -> list[Document]:
        """The first ``count`` documents with enough tokens, or fewer if there are no more."""
        found, longest = [], 0
        for document in map(self.document, texts):
            longest = max(longest, len(document.ids))
            if len(document.ids) >= tokens:
                found.append(document)
            if len(found) == count:
                break
        if not found:
            raise ValueError(too_short(tokens, longest))
        return found

    def document(self, text: str) -> Document:
        """A text in tokens, and the places where needles may stand in it."""
        ids, ends = self._encode(text)
        for pattern in (SENTENCE_END, LINE_END):
            places = _ends(pattern, text, ends)
            if len(places) * RARE >= len(ids):
                break
        else:
            places = np.arange(1, len(ids) + 1)
        return Document(ids, np.union1d(places, [len(ids)]))

    def needles(self, rng: random.Random) -> list[Needle]:
        """All needles of a row, without a key or value twice."""
        least = 10 ** (self.template.digits - 1)
        words = rng.sample(self.words, self.keys)
        values = rng.sample(range(least, 10 * least), self.keys)
        return [self._needle(key, str(value)) for key, value in zip(words, values, strict=True)]

    def _needle(self, key: str, value: str) -> Needle:
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
        return Needle(key, value, self._encode(line)[0], ids, answer_tokens)

    def room(self, tokens: int, needles: list[Needle], asked: list[Needle]) -> int:
        """Number of tokens that are left for the haystack."""
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
        document: Document,
        first: int,
        room: int,
        needles: list[Needle],
        depths: list[float],
    ) -> tuple[list[int], int]:
        """The row up to its question, and the place in it where the first needle begins."""
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
    """Numbers of tokens after which the text has reached a match: those up to the last token that
    ends in it."""
    spans = [match.span(1) for match in pattern.finditer(text)]
    if not spans:
        return np.empty(0, dtype=np.int64)
    first, last = np.array(spans).T
    count = np.searchsorted(ends, last, side="right")
    return np.unique(count[(count > 0) & (ends[count - 1] >= first)])


def too_short(tokens: int, longest: int) -> str:
    return (
        f"no document has {tokens} tokens: the longest has {longest}. Ask for shorter rows, or use "
        "longer documents."
    )
