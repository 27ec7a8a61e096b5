"""The demo's model, at the context length it is extended to, and its texts."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
TOKENS = 2048
# The model was pretrained on 512 tokens. Linear scaling starts and ends worse (see docs/LOG.md).
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def load_model():
    """The pretrained model, its positions scaled to `TOKENS`, in fp32."""
    config = AutoConfig.from_pretrained(HERE / "model", use_cache=False)
    config.rope_parameters |= ROPE
    config.max_position_embeddings = TOKENS
    return AutoModelForCausalLM.from_pretrained(HERE / "model", config=config, dtype="float32")


def rows(tokenizer, pattern: str) -> list[dict]:
    """The books' tokens in rows of `TOKENS`; no row spans two books, rests are left out."""
    samples = []
    for path in sorted((HERE / "text").glob(pattern)):
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        for start in range(0, len(ids) - TOKENS + 1, TOKENS):
            row = ids[start : start + TOKENS]
            samples.append({"input_ids": row, "labels": row})
    return samples
