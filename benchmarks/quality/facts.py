"""Facts that rows tell, and the questions that ask for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.words import (
    ADJECTIVES,
    CATEGORIES,
    FIRST,
    HOUSES,
    LAST,
    NOUNS,
    SYNONYMS,
    of_split,
)

DIGITS = 5
LEXICAL_KINDS = ("value", "quotation")
HIDDEN_KINDS = ("alias", "two hops", "three hops", "synonym", "category")

# How a fact of "category" may be told.
PICTURES = (
    "Somebody painted a {member} next to the {told}.",
    "{told}, with {member}: so the sketch was named.",
    "An old print shows {member} and {told} together.",
    "Whoever carved the {told} added {member} below.",
    "Of {member} and {told} alone the tapestry was made.",
    "There hung a {told} embroidered around some {member}.",
    "In chalk, on slate, {told} and also {member}.",
    "Her drawing joined {member} to {told}.",
)


@dataclass(frozen=True)
class Question:
    """Something to find out.

    Attributes:
        kind: Of `LEXICAL_KINDS` or `HIDDEN_KINDS`.
        facts: Sentences that tell it, to be placed apart in the text; the last one holds the answer
            (or what it is concluded from).
        ask: The question.
        answer: With a leading space.
        recall: A statement that the answer ends; of "value" alone.
    """

    kind: str
    facts: tuple[str, ...]
    ask: str
    answer: str
    recall: str = ""


class Draw:
    """Words without repetition for one row.

    Args:
        rng: Of the row.
        split: "train" or "test": which synonyms and members of categories may come.
    """

    def __init__(self, rng: np.random.Generator, split: str):
        self.rng = rng
        self._things = self._pairs(ADJECTIVES, NOUNS, " ")
        self._people = self._pairs(FIRST, LAST, " ")
        self._houses = iter(rng.permutation(HOUSES))
        pairs = of_split(SYNONYMS, split)
        self._synonyms = (pairs[i] for i in rng.permutation(len(pairs)))
        members = [(m, c) for c, found in CATEGORIES.items() for m in of_split(found, split)]
        self._members = (members[i] for i in rng.permutation(len(members)))

    def _pairs(self, first: tuple[str, ...], second: tuple[str, ...], gap: str) -> Iterator[str]:
        """No two share a word."""
        a, b = self.rng.permutation(first), self.rng.permutation(second)
        return (f"{x}{gap}{y}" for x, y in zip(a, b, strict=False))

    def thing(self) -> str:
        """An adjective and a noun."""
        return next(self._things)

    def person(self) -> str:
        """First and last name."""
        return next(self._people)

    def number(self) -> str:
        """`DIGITS` digits."""
        return str(self.rng.integers(10 ** (DIGITS - 1), 10**DIGITS))

    def value(self) -> Question:
        """A key's value, asked by the key."""
        thing, number = self.thing(), self.number()
        fact = f"The number of the {thing} is {number}."
        ask, recall = (
            f"What is the number of the {thing}?",
            f"As noted, the number of the {thing} is",
        )
        return Question("value", (fact,), ask, f" {number}", recall)

    def alias(self) -> Question:
        """The value belongs to a thing that the question calls by another name."""
        thing, name, person, number = self.thing(), self.thing(), self.person(), self.number()
        facts = (f"{person} calls the {thing} the {name}.", f"On the {thing} stands {number}.")
        return Question("alias", facts, f"Which digits belong to the {name}?", f" {number}")

    def two_hops(self) -> Question:
        """A person's house, the house's number."""
        person, house, number = self.person(), next(self._houses), self.number()
        facts = (f"{person} lives at {house}.", f"The gate of {house} bears {number}.")
        return Question("two hops", facts, f"Which digits has the home of {person}?", f" {number}")

    def three_hops(self) -> Question:
        """A person's master, the master's house, the house's number."""
        servant, master = self.person(), self.person()
        house, number = next(self._houses), self.number()
        facts = (
            f"{servant} serves {master}.",
            f"{master} lives at {house}.",
            f"The gate of {house} bears {number}.",
        )
        ask = f"Which digits has the home of the master of {servant}?"
        return Question("three hops", facts, ask, f" {number}")

    def synonym(self) -> Question:
        """The question has another word for who is meant."""
        (told, asked), number = next(self._synonyms), self.number()
        fact = f"Beside the {told} they wrote {number}."
        return Question("synonym", (fact,), f"Which digits belong to the {asked}?", f" {number}")

    def category(self) -> Question:
        """Another word for who is meant, and an answer that stands nowhere: what kind it is.

        Facts have different wordings, or their places would be found by what they share.
        """
        (told, asked), (member, kind) = next(self._synonyms), next(self._members)
        fact = str(self.rng.choice(PICTURES)).format(told=told, member=member)
        return Question("category", (fact,), f"What kind has the {asked}?", f" {kind}")


MAKERS: dict[str, Callable[[Draw], Question]] = {
    "value": Draw.value,
    "alias": Draw.alias,
    "two hops": Draw.two_hops,
    "three hops": Draw.three_hops,
    "synonym": Draw.synonym,
    "category": Draw.category,
}
