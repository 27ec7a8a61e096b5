"""Which products of a model are in FP8, and the copies of its weights."""

import pytest

from lemo_hf.core import fp8

HALF = {"retention": 0.5, "block_size": 8, "policy": "recent"}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(fp8, "FEWEST_ROWS", 8)


def in_fp8(model):
    return any(map(fp8.has_fp8, model.modules()))


def copies_of(model):
    """FP8 copies by the name of their linear; None for one that was not needed yet."""
    return {n: fp8.linears[m].copy for n, m in model.named_modules() if fp8.has_fp8(m)}
