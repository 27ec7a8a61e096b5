"""Rows that ask at their end, and whose answers alone are labels."""

import numpy as np

from benchmarks.quality.facts import HIDDEN_KINDS, LEXICAL_KINDS, MAKERS, Draw, Question
from benchmarks.quality.row import Row, RowSet, make_row, weave
from benchmarks.quality.source import Source, passages

CUE, QUOTED = 16, 8  # tokens of a quotation that are given, and that are asked for
QUESTIONS, TOLD = 16, 32  # of a lexical row: asked, and keys with a value
# Of a hidden row, asked; as many again of each kind are told and not asked.
HIDDEN_ASKED = dict(zip(HIDDEN_KINDS, (4, 3, 3, 3, 3), strict=True))
WHOLE = 4096  # tokens from which on a row has all its questions
TITLE = "\n\nQuestions about the text above."


def lexical_row(source: Source, rows: RowSet, rng: np.random.Generator) -> Row:
    """Half of the questions ask for a key's value, half to continue a quotation."""
    share = min(1.0, rows.tokens / WHOLE)
    asked = max(1, round(share * QUESTIONS / 2))
    draw = Draw(rng, rows.split)
    told = [draw.value() for _ in range(max(asked, round(share * TOLD)))]
    return _completion(source, rows, rng, told, told[:asked], quotations=asked)


def hidden_row(source: Source, rows: RowSet, rng: np.random.Generator) -> Row:
    """Questions that share no words with the place of their answer."""
    share = min(1.0, rows.tokens / WHOLE)
    draw = Draw(rng, rows.split)
    told: list[Question] = []
    asked: list[Question] = []
    for kind, count in HIDDEN_ASKED.items():
        count = max(1, round(share * count))
        found = [MAKERS[kind](draw) for _ in range(2 * count)]
        told += found
        asked += found[:count]
    return _completion(source, rows, rng, told, asked)


def _completion(
    source: Source,
    rows: RowSet,
    rng: np.random.Generator,
    told: list[Question],
    asked: list[Question],
    quotations: int = 0,
) -> Row:
    """A row that ends with ``asked`` and ``quotations`` passages to continue, in any order."""
    facts = source.told(told)
    needed = {fact for question in asked for fact in question.facts}
    gold = [fact in needed for question in told for fact in question.facts]
    pairs = [
        (source.encode(f"\nQuestion: {q.ask}\nAnswer:"), source.encode(q.answer)) for q in asked
    ]
    cue, end = source.encode('\nContinue the quotation: "'), source.encode('"')
    title = source.encode(TITLE)
    tail = len(title) + sum(len(a) + len(b) for a, b in pairs)
    tail += quotations * (len(cue) + CUE + QUOTED + len(end))
    text = source.book(rows, rng, rows.tokens - tail - sum(map(len, facts)))
    quoted = passages(rng, len(text), quotations, CUE + QUOTED)
    order = rng.permutation(len(facts))
    places = source.places(rng, text, len(facts), quoted)
    ids, spans, moved = weave(text, places, [facts[i] for i in order])
    gold_spans = [spans[place] for place, i in enumerate(order) if gold[i]]
    asks = [(*pair, [], question.kind) for pair, question in zip(pairs, asked, strict=True)]
    for start, stop in quoted:
        a, b = moved(start), moved(stop - 1) + 1
        gold_spans.append((a, b))
        passage = ids[a:b].tolist()
        asks.append(([*cue, *passage[:CUE]], passage[CUE:], end, LEXICAL_KINDS[1]))
    parts, answers, kinds = [*ids.tolist(), *title], [], []
    for i in rng.permutation(len(asks)):
        question, answer, after, kind = asks[i]
        begin = len(parts) + len(question)
        answers.append((begin, begin + len(answer)))
        kinds.append(kind)
        parts += [*question, *answer, *after]
    return make_row(parts, answers, kinds, gold_spans, asked_from=len(ids))
