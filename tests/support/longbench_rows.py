"""Rows of LongBench for tests: real ones, and ones made for a test."""

import json

from support.paths import ROOT

ROWS = ROOT / "tests" / "data" / "longbench" / "rows"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<model>"


def row(text, answers=("a",), classes=None, question="?"):
    """With all fields that LongBench has."""
    fields = {"input": question, "context": text, "answers": list(answers), "length": len(text)}
    return {**fields, "all_classes": classes, "_id": "0", "dataset": "x", "language": "en"}


def as_lines(rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
