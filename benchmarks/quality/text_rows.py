"""Rows of book text whose tokens are all labels: facts come again in them, and passages do."""

import numpy as np

from benchmarks.quality.facts import LEXICAL_KINDS, Draw
from benchmarks.quality.row import Row, RowSet, Span, make_row, weave
from benchmarks.quality.source import Source, passages

NOTE_EVERY, QUOTE_EVERY = 4096, 8192  # tokens of a row for each fact and for each quotation
CUE, RECALLED = 16, 32  # tokens of a quotation: not counted, and counted
ROOM = 4  # places to choose from for each quotation


def text_row(source: Source, rows: RowSet, rng: np.random.Generator) -> Row:
    """Notes that tell a key's value and later remind of it, and passages that are quoted later."""
    notes = max(1, rows.tokens // NOTE_EVERY)
    quotes = max(1, rows.tokens // QUOTE_EVERY)
    draw = Draw(rng, rows.split)
    values = [draw.value() for _ in range(notes)]
    told = source.told(values)
    again = [source.encode(f"\n{value.recall}") for value in values]
    numbers, stop = [source.encode(value.answer) for value in values], source.encode(".\n")
    cue, end = source.encode('\nAs was said: "'), source.encode('"\n')
    size = sum(map(len, [*told, *again, *numbers])) + notes * len(stop)
    size += quotes * (len(cue) + CUE + RECALLED + len(end))
    text = source.book(rows, rng, rows.tokens - size)
    quoted = passages(rng, len(text), quotes, CUE + RECALLED)
    spots = source.places(rng, text, 2 * notes + ROOM * quotes, quoted)
    spots = [spots[i] for i in rng.permutation(len(spots))]
    # Place, ids, what of them is an answer, and its kind; None for what tells.
    pieces: list[tuple[int, list[int], Span | None, str]] = []
    for note in range(notes):
        first, later = sorted(spots[2 * note : 2 * note + 2])
        pieces.append((first, told[note], None, "fact"))
        head, number = again[note], numbers[note]
        answer = (len(head), len(head) + len(number))
        pieces.append((later, [*head, *number, *stop], answer, LEXICAL_KINDS[0]))
    answer = (len(cue) + CUE, len(cue) + CUE + RECALLED)
    free = spots[2 * notes :]
    for begin, after in quoted.tolist():
        spot = next((spot for spot in free if spot >= after), after)
        if spot in free:
            free.remove(spot)
        pieces.append((spot, [*cue, *text[begin:after].tolist(), *end], answer, LEXICAL_KINDS[1]))
    pieces.sort(key=lambda piece: piece[0])
    ids, spans, moved = weave(text, [p[0] for p in pieces], [p[1] for p in pieces])
    answers, kinds = [], []
    gold = [(moved(a), moved(b - 1) + 1) for a, b in quoted]
    for (begin, after), (_, _, inside, kind) in zip(spans, pieces, strict=True):
        if inside is None:
            gold.append((begin, after))
        else:
            answers.append((begin + inside[0], begin + inside[1]))
            kinds.append(kind)
    return make_row(ids, answers, kinds, gold)
