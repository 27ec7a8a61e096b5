"""What leaving tokens out costs models whose layers pass a state on, and one with attention alone.

Small models are trained from nothing on books, all tokens kept. Each then goes on for some steps on
the same rows in several ways, and is asked held-out books whole. Texts are those that
benchmarks/quality/prepare.py makes.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.quality.texts import Texts
from benchmarks.record import command_line, environment, save
from lemo_hf import LeMoConfig, apply_lemo, remove_lemo

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DELTA = {
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
EVERY_THIRD = ["full_attention" if i % 3 == 2 else "conv" for i in range(12)]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("qwen3", {}),
    "convolution": ("lfm2", {"layer_types": EVERY_THIRD, "block_auto_adjust_ff_dim": False}),
    "delta rule": ("qwen3_5_text", DELTA),
}
HALF = {"retention": 0.5, "block_size": 64}
WAYS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "rows cut in half": None,
    "LeMo, window": {**HALF, "policy": "window"},
    "LeMo, window, blocks of 256": {**HALF, "block_size": 256, "policy": "window"},
    "LeMo, scattered": {**HALF, "policy": "random"},
    "LeMo, scattered, 4 dense layers": {**HALF, "policy": "random", "dense_first_layers": 4},
}
RATE = 1e-3


def built(kind: str, device: torch.device, tiny: bool) -> nn.Module:
    """A model of fresh fp32 weights."""
    model_type, more = MODELS[kind]
    sizes = SIZES | more
    if tiny:
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
        sizes |= small | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
        sizes |= {"layer_types": EVERY_THIRD[:6]} if kind == "convolution" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)


def rows(texts: Texts, tokens: int, seed: int) -> Iterator[np.ndarray]:
    """Pieces of books, long ones more often."""
    chance = np.random.default_rng(seed)
    books, weights = texts.books["train"], texts.book_weights["train"]
    while True:
        book = books[chance.choice(len(books), p=weights)]
        if len(book) > tokens:
            start = chance.integers(len(book) - tokens)
            yield book[start : start + tokens]


def taught(
    model: nn.Module, way: str, source: Iterator, args: Any, steps: int, rate: float
) -> dict:
    """Train ``model`` in place; its time and the mean loss of the last steps."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=args.fused)
    lemo = WAYS[way]
    if lemo is not None:
        apply_lemo(model, LeMoConfig(**lemo))
    pieces = 2 if way == "rows cut in half" else 1
    losses, begin = [], time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm, rest = min(1.0, (step + 1) / 50), step / steps
            group["lr"] = rate * warm * (0.1 + 0.9 * (1 + math.cos(math.pi * rest)) / 2)
        block = np.stack([next(source) for _ in range(args.rows)]).astype(np.int64)
        ids = torch.from_numpy(block).to(device).view(args.rows * pieces, -1)
        if pieces == 2:  # one half of each row: as many tokens as LeMo keeps
            ids = ids[step % 2 :: 2]
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    remove_lemo(model)
    found = torch.stack(losses).tolist()
    took = time.perf_counter() - begin
    return {
        "steps": steps,
        "seconds": round(took, 1),
        "loss": round(float(np.mean(found[-20:])), 4),
    }


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Of held-out windows, the stock model on all tokens."""
    model.eval()
    losses = []
    for ids in windows.split(4):
        with torch.autocast(ids.device.type, torch.bfloat16):
            losses.append(model(input_ids=ids, labels=ids).loss * len(ids))
    model.train()
    return round(math.exp(float(sum(losses)) / len(windows)), 3)


def run(args: Any) -> list[dict]:
    """All ways of all models; the file is written anew after each."""
    device = torch.device("cpu" if args.tiny else "cuda")
    args.fused = device.type == "cuda"
    texts, found = Texts.load(args.texts), []
    windows = torch.from_numpy(texts.windows(args.tokens, args.windows).astype(np.int64)).to(device)
    header = environment(device) | {"commit": args.commit, "command": args.command}
    for kind in args.models:
        base = built(kind, device, args.tiny).train()
        parameters = sum(p.numel() for p in base.parameters())
        row = {"model": kind, "parameters": parameters, "tokens": args.tokens, "rows": args.rows}
        first = taught(base, "dense", rows(texts, args.tokens, 1), args, args.base_steps, RATE)
        found.append({**row, "way": "base", **first, "perplexity": perplexity(base, windows)})
        for way in WAYS:
            model = copy.deepcopy(base)
            # Everyone sees the same rows.
            more = taught(model, way, rows(texts, args.tokens, 2), args, args.steps, 0.3 * RATE)
            found.append({**row, "way": way, **more, "perplexity": perplexity(model, windows)})
            print(json.dumps(found[-1]), flush=True)
            save(args.output, header, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--texts", type=Path, required=True, help="folder made by quality/prepare.py")
    add("--output", type=Path, required=True, help="a JSON file")
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--tokens", type=int, default=4096, help="of a row")
    add("--rows", type=int, default=8, help="of a step")
    add("--base-steps", type=int, default=700)
    add("--steps", type=int, default=200, help="of each way")
    add("--windows", type=int, default=32, help="that are asked")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--tiny", action="store_true", help="tiny models on the CPU: does the script run?")
    args = parser.parse_args()
    args.command = command_line("bench_hybrid.py", sys.argv[1:])
    if not (args.tiny or torch.cuda.is_available()):
        raise SystemExit("bench_hybrid.py trains on a CUDA GPU, and there is none.")
    run(args)


if __name__ == "__main__":
    main()
