"""Whole optimizer steps: Hugging Face + PEFT against lemo-hf, with and without checkpointing.

One model serves all providers. They take turns, so that a drift of the machine meets all of them:
a turn empties the allocator's cache, takes one step that is not timed, and times the next.
"""

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from record import command_line, earlier_rows, environment, save, summary
from steps import (
    LORA,
    PROVIDERS,
    SHAPES,
    adapter_weights,
    build_model,
    empty_memory,
    lemo_config,
    parse_provider,
    print_kernels,
    provider_on,
    take_turn,
    train_step,
)
from torch import nn

from lemo_hf import LeMoConfig

RESULTS = Path(__file__).parent / "results"
LENGTHS = [8192, 16384, 32768, 65536]
MAY_DIFFER = ("date", "commands", "commit")  # between the runs of one file


def measure_length(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: int,
    args: argparse.Namespace,
    status: dict[str, str],
) -> Iterator[list[dict]]:
    """The rows of one length, one a provider, after each round.

    Args:
        model: From `build_model`.
        optimizer: Of its adapters.
        tokens: Length of the sequence.
        args: The command line.
        status: Why a provider does not run; what stops one on the way is added.
    """
    device = next(model.parameters()).device
    step = partial(train_step, model, optimizer, tokens)
    samples = {provider: [] for provider in args.providers}
    for _ in range(args.rounds):
        for provider in args.providers:
            if provider in status or time.monotonic() > args.deadline:
                continue
            empty_memory(optimizer)
            with provider_on(model, provider, args.lemo) as lemo:
                result = take_turn(step, lemo, device)
            if isinstance(result, str):
                status[provider] = result
            else:
                samples[provider].append(result)
        rows = []
        for provider, taken in samples.items():
            config = lemo_config(provider, args.lemo)
            row = {"tokens": tokens, "provider": provider}
            row["retention"] = None if config is None else config.retention
            row["status"] = status.get(provider, "ok" if taken else "not run: time budget")
            row.update(summary(taken, tokens) if row["status"] == "ok" else {})
            rows.append({**row, "config": None if config is None else config.to_dict()})
        yield rows
    if args.profile and time.monotonic() < args.deadline:
        empty_memory(optimizer)
        with provider_on(model, args.profile, args.lemo) as lemo:
            result = take_turn(step, lemo, device)
            print(f"{args.profile}, {tokens} tokens:", end=" ")
            print(result) if isinstance(result, str) else print_kernels(step)
    empty_memory(optimizer)


def run(args: argparse.Namespace, shapes: dict, device: torch.device) -> list[dict]:
    """Measure what ``args`` asks for; the file is written anew after each round.

    Returns:
        All rows.
    """
    torch.manual_seed(0)
    header = {
        **environment(device),
        "commit": args.commit,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or "default",
        "lora": LORA,
        "commands": [args.command],
    }
    slug = header["gpu"].lower().replace(" ", "-")
    path = args.output or RESULTS / slug / "bench_step.json"
    kept = earlier_rows(path, header, MAY_DIFFER) if args.append and path.exists() else []
    done: list[dict] = []
    for title, lengths in args.models:
        model = optimizer = None  # the one before makes room
        gc.collect()
        torch.cuda.empty_cache()
        model = build_model(shapes[title], max(lengths), device)
        weights = adapter_weights(model)
        header["lora_dtype"] = str(weights[0].dtype).removeprefix("torch.")
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
        too_long: dict[str, str] = {}
        for tokens in sorted(lengths):
            skipped = {
                p: "not run: skipped" for p in args.providers if f"{p}@{tokens}" in args.skip
            }
            rows = []
            for rows in measure_length(model, optimizer, tokens, args, {**skipped, **too_long}):
                rows = [{"model": title, **row} for row in rows]
                new = {case(row) for row in done + rows}
                save(path, header, [row for row in kept if case(row) not in new] + done + rows)
            done += rows
            for row in rows:
                print_row(row)
                if row["status"] == "oom":
                    too_long[row["provider"]] = f"not run: OOM at {tokens}"
    return done


def case(row: dict) -> tuple:
    """What makes a row unique."""
    return row["model"], row["tokens"], row["provider"]


def print_row(row: dict) -> None:
    """One short line."""
    text = row["status"]
    if text == "ok":
        text = f"{row['ms_median']:7.0f} ms {row['peak_gib']:6.1f} GiB  loss {row['loss']:.2f}"
    print(f"{row['model']}  {row['tokens']:6d}  {row['provider']:22s}  {text}", flush=True)


def parse_args(argv: list[str], shapes: dict = SHAPES) -> argparse.Namespace:
    """The command line; every field of `LeMoConfig` but retention is an option too."""
    titles = {title.lower().replace(" ", "-"): title for title in shapes}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--models", nargs="+", default=list(titles), metavar="MODEL[:TOKENS,...]", help=str(titles))
    add(
        "--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of models without their own"
    )
    add("--providers", nargs="+", default=PROVIDERS, help="hf or lemo-RETENTION, +checkpointing")
    add("--skip", nargs="+", default=[], metavar="PROVIDER@TOKENS", help="recorded as not run")
    add("--rounds", type=int, default=3, help="turns of each provider")
    add("--time-budget", type=float, default=float("inf"), help="seconds; no turn begins after it")
    add("--profile", nargs="?", const="lemo-0.5", metavar="PROVIDER", help="print its kernels too")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--output", type=Path, help="default: benchmarks/results/GPU/bench_step.json")
    add("--append", action="store_true", help="keep the output's rows that are not measured again")
    fields = [f.name for f in dataclasses.fields(LeMoConfig) if f.name != "retention"]
    for name in fields:
        add(f"--{name.replace('_', '-')}", type=_value, metavar="VALUE")
    args = parser.parse_args(argv)
    args.lemo = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    models = []
    for model in args.models:
        slug, _, lengths = model.partition(":")
        if slug not in titles:
            parser.error(f"--models: {slug!r} is none of {', '.join(titles)}")
        own = [int(tokens) for tokens in lengths.split(",")] if lengths else args.lengths
        models.append((titles[slug], own))
    args.models = models
    try:
        for provider in [*args.providers, *filter(None, [args.profile])]:
            parse_provider(provider)
            lemo_config(provider, args.lemo)
    except ValueError as error:
        parser.error(str(error))
    args.deadline = time.monotonic() + args.time_budget
    args.command = command_line("bench_step.py", argv)
    return args


def _value(text: str):
    """A number, true or false as JSON writes them; any other text as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    args = parse_args(sys.argv[1:])
    if not torch.cuda.is_available():
        raise SystemExit("bench_step.py measures on a CUDA GPU, and there is none.")
    rows = run(args, SHAPES, torch.device("cuda"))
    if any(row["status"].startswith("failed") for row in rows):
        raise SystemExit("Some providers failed; see above.")


if __name__ == "__main__":
    main()
