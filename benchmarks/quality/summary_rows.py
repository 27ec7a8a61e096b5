"""Rows of news reports, some of which are summarised at the end: LongBench's multi_news, packed."""

import numpy as np

from benchmarks.quality.row import Row, RowSet, make_row
from benchmarks.quality.source import Source

EVERY = 16384  # tokens of a row for each report that is to be summarised
LONGEST_REPORT, LONGEST_SUMMARY = 4096, 512  # tokens that are used
HEAD = 32  # more than the tokens of a headline, and of what asks


def summary_row(source: Source, rows: RowSet, rng: np.random.Generator) -> Row:
    """Numbered reports; at the end "Summary of report 3:", and the summary, which is labelled."""
    reports, summaries = source.texts.reports[rows.split], source.texts.summaries[rows.split]
    count = max(1, rows.tokens // EVERY)
    longest = min(LONGEST_REPORT, rows.tokens // (2 * count))
    longest_summary = min(LONGEST_SUMMARY, rows.tokens // (8 * count))
    order = rng.permutation(len(reports)).tolist()
    asked, others = order[:count], order[count:]
    room = rows.tokens - count * (longest_summary + HEAD)
    shown: list[int] = []
    for report in [*asked, *others]:
        if room <= 0:
            break
        shown.append(report)
        room -= HEAD + min(longest, len(reports[report]))
    shown = [shown[i] for i in rng.permutation(len(shown))]
    tails = [
        (
            source.encode(f"\n\nSummary of report {shown.index(report) + 1}:"),
            summaries[report][:longest_summary].tolist(),
        )
        for report in asked
    ]
    parts = [
        [*source.encode(f"\n\nReport {place}\n"), *reports[report][:longest].tolist()]
        for place, report in enumerate(shown, 1)
    ]
    excess = sum(map(len, parts)) + sum(len(a) + len(b) for a, b in tails) - rows.tokens
    for place, report in enumerate(shown):  # what is too much goes off reports nobody asks for
        if excess > 0 and report not in asked:
            cut = min(excess, len(parts[place]))
            parts[place] = parts[place][: len(parts[place]) - cut]
            excess -= cut
    ids = source.book(rows, rng, -excess).tolist() if excess < 0 else []
    gold, answers = [], []
    for part, report in zip(parts, shown, strict=True):
        if report in asked:
            gold.append((len(ids), len(ids) + len(part)))
        ids += part
    begin = len(ids)
    for ask, summary in tails:
        start = len(ids) + len(ask)
        answers.append((start, start + len(summary)))
        ids += [*ask, *summary]
    return make_row(ids, answers, ["summary"] * count, gold, asked_from=begin)
