"""Needles in the demo's books: how they read, and rows with them."""

import pytest
from transformers import AutoTokenizer

from lemo_hf.eval.needles import needle_rows
from support.paths import DEMO, MODEL

NEEDLE = "The special magic number for {} is: {}."
QUESTION = "What is the special magic number for {0}? The special magic number for {0} is: {1}"
DEPTHS = (0.0, 0.3, 0.5, 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def books():
    paths = sorted((DEMO / "text").glob("heldout-*.txt"))
    return [path.read_text(encoding="utf-8")[:30000] for path in paths]


def make(documents, tokenizer, **options):
    settings = {"lengths": [300, 1000], "depths": DEPTHS, "samples": 2, "progress": False}
    return needle_rows(documents, tokenizer, **{**settings, **options})
