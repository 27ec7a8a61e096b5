"""The demo's model, at the context length it is extended to, and the rows of its two tasks."""

import random
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
TOKENS = 2048
# The model was pretrained on 512 tokens. Linear scaling starts and ends worse (see docs/LOG.md).
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
QUOTATIONS, CUE, QUOTED = 12, 8, 8  # of a row; tokens given, and tokens to add
UNLABELLED = -100


def load_model():
    """The pretrained model, its positions scaled to `TOKENS`, in fp32."""
    config = AutoConfig.from_pretrained(HERE / "model", use_cache=False)
    config.rope_parameters |= ROPE
    config.max_position_embeddings = TOKENS
    return AutoModelForCausalLM.from_pretrained(HERE / "model", config=config, dtype="float32")


def rows(tokenizer, pattern: str, tokens: int = TOKENS) -> list[dict]:
    """The books' tokens in rows of ``tokens``; no row spans two books, rests are left out."""
    samples = []
    for path in sorted((HERE / "text").glob(pattern)):
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        for start in range(0, len(ids) - tokens + 1, tokens):
            row = ids[start : start + tokens]
            samples.append({"input_ids": row, "labels": row})
    return samples


def quotation_rows(tokenizer, pattern: str) -> list[dict]:
    """Rows that end with quotations from their text; only what continues them is a label."""
    mark = tokenizer('\n"')["input_ids"]
    tail = QUOTATIONS * (len(mark) + CUE + QUOTED)
    samples, chance = [], random.Random(0)
    for row in rows(tokenizer, pattern, TOKENS - tail):
        text = row["input_ids"]
        ids, labels = list(text), [UNLABELLED] * len(text)
        for _ in range(QUOTATIONS):
            start = chance.randrange(len(text) - CUE - QUOTED)
            passage = text[start : start + CUE + QUOTED]
            ids += mark + passage
            labels += [UNLABELLED] * (len(mark) + CUE) + passage[CUE:]
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def cut(samples: list[dict]) -> list[dict]:
    """Rows half as long: the ends of rows that ask there, both halves of all others."""
    half = TOKENS // 2
    ends = [{name: ids[half:] for name, ids in row.items()} for row in samples]
    if any(UNLABELLED in row["labels"] for row in samples):
        return ends
    begins = [{name: ids[:half] for name, ids in row.items()} for row in samples]
    return [part for pair in zip(begins, ends, strict=True) for part in pair]
