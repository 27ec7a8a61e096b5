"""Optimizer steps by `LeMoTrainer` and `Trainer` on one and several GPUs, as users launch them.

    CUDA_VISIBLE_DEVICES=0 python benchmarks/bench_scaling.py            # one GPU
    torchrun --nproc_per_node 4 benchmarks/bench_scaling.py --append     # four of them

The second run finds the first one's rows in the file and says how its own compare (`compared`).
Every case makes its model anew on each GPU, since FSDP2 cannot be taken off one.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from longest_search import MOST_TRIALS, STEP, Search
from model_shapes import LORA
from providers import provider_of
from record import command_line, earlier_rows, environment, save, summary
from scaling_cases import GROUPS, MODEL, Case, Meter, trainer_of
from steps import Bench, why

RESULTS = Path(__file__).parent / "results"
MAY_DIFFER = ("date", "commands", "commit")
TINY_TOKENS = 1024
LONGEST = "lemo+checkpointing"


def measure_case(case: Case, args: argparse.Namespace, device: torch.device) -> dict:
    """The row of one case; all processes return the same."""
    meter = Meter(device, args.warm_up, args.warm_up + args.steps + (not args.tiny))
    status, losses = "ok", []
    try:
        trainer = trainer_of(case, args.gpus, device, meter)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    except Exception as error:  # out of memory, in all processes alike
        status = why(error)
    trainer = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found = together((status, meter.samples, meter.nccl_ms))
    row = {"group": case.group, "engine": case.engine, "gpus": args.gpus}
    row |= {"provider": case.provider, "tokens": case.tokens, "checkpointing": case.checkpointing}
    row["status"] = next((s for s, *_ in found if s != "ok"), "ok")
    if row["status"] == "ok":
        sequences = 1 if case.engine == "sequence" else args.gpus
        # All wait for the slowest; memory is that of the fullest.
        slowest = max((s for _, s, _ in found), key=lambda s: statistics.median(x["ms"] for x in s))
        row |= summary([{**x, "loss": losses[-1]} for x in slowest], sequences * case.tokens)
        for peak in ("peak_gib", "reserved_gib"):
            row[peak] = round(max(x[peak] for _, s, _ in found for x in s), 2)
        row["nccl_ms"] = meter.nccl_ms
    return {**row, "command": args.command}


def longest(args: argparse.Namespace, device: torch.device) -> dict:
    """The longest sequence whose dry step stays below the cap on each GPU, shared by all of them.

    Nothing enforces the cap, which must lie well below the GPU's memory: a process that ran out of
    it would leave the others waiting.
    """
    bench = Bench(MODEL, 2**22, device, args.tiny, {"sequence_parallel_size": args.gpus})
    search = Search(64 if args.tiny else STEP)
    provider, limit = provider_of(LONGEST), 8192 if args.tiny else 2**22
    while not search.done and search.trials < MOST_TRIALS:
        tokens = min(limit, search.guess(args.cap))
        dry = bench.dry(provider, tokens)
        found = together((dry.status, dry.reserved_gib))
        status = next((s for s, _ in found if s != "ok"), "ok")
        peak = max(p for _, p in found)
        if status == "ok" and (peak > args.cap or tokens == limit):
            status = "cap"
        say(f"dry: {tokens} tokens, {peak:.1f} GiB, {status}")
        search.add(tokens, status, peak)
        if status not in ("ok", "cap"):
            break
    bench.close()
    row = {"group": "longest", "engine": "sequence", "gpus": args.gpus, "provider": LONGEST}
    row |= {"tokens": search.fits, "too_long": search.too_long, "limit": search.limit}
    row |= {"status": "ok" if search.fits else search.limit, "cap_gib": args.cap}
    return {**row, "dry_reserved_gib": search.peaks.get(search.fits), "command": args.command}


def together(value: Any) -> list:
    """``value`` of every process."""
    found = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def compared(rows: list[dict]) -> list[dict]:
    """Rows with what they are by comparison.

    ``efficiency``: tokens a second and GPU, over those of one GPU; ``speed_up``: over plain Trainer
    with the same engine and GPUs; ``longer``: the longest sequence over that of one GPU.
    """
    done = []
    for row in rows:
        row = {k: v for k, v in row.items() if k not in ("efficiency", "speed_up", "longer")}
        same = [r for r in rows if r["status"] == row["status"] == "ok"]
        same = [r for r in same if r["group"] == row["group"]]
        if row["group"] == "longest":
            for other in same:
                if (other["gpus"], other["cap_gib"]) == (1, row["cap_gib"]):
                    row["longer"] = round(row["tokens"] / other["tokens"], 2)
            done.append(row)
            continue
        same = [r for r in same if r["tokens"] == row["tokens"]]
        for other in same:
            if other["gpus"] == 1 and other["provider"] == row["provider"]:
                share = row["tokens_per_s"] / (row["gpus"] * other["tokens_per_s"])
                row["efficiency"] = round(share, 3)
            alike = (other["gpus"], other["engine"]) == (row["gpus"], row["engine"])
            if alike and other["provider"] == "hf" and row["provider"] == "lemo":
                row["speed_up"] = round(other["ms_median"] / row["ms_median"], 2)
        done.append(row)
    return done


def key_of(row: dict) -> tuple:
    """What makes a row unique."""
    names = ("group", "engine", "gpus", "provider", "tokens", "cap_gib")
    # The longest length is a result.
    return tuple(row.get(n) for n in names if row["group"] != "longest" or n != "tokens")


def say(text: str) -> None:
    """Print it, once."""
    if PartialState().is_main_process:
        print(text, flush=True)


def run(args: argparse.Namespace) -> list[dict]:
    """Measure what ``args`` asks for; the file is written anew after each case."""
    state = PartialState(cpu=args.tiny)
    args.gpus, device = state.num_processes, state.device
    torch.manual_seed(0)
    header = {**environment(device, ("torch", "triton", "transformers", "accelerate", "peft"))}
    header |= {"commit": args.commit, "model": MODEL, "lora": LORA, "commands": [args.command]}
    header["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF") or "default"
    path = args.output or RESULTS / header["gpu"].lower().replace(" ", "-") / "bench_scaling.json"
    kept = earlier_rows(path, header, MAY_DIFFER) if args.append and path.exists() else []
    together(None)  # all have read it before one writes
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        new = {key_of(r) for r in rows}
        every = compared([r for r in kept if key_of(r) not in new] + rows)
        if state.is_main_process:
            save(path, header, every)
        shown = next(r for r in every if key_of(r) == key_of(row))
        say("  ".join(f"{k} {v}" for k, v in shown.items() if k != "command"))

    for case in args.cases:
        late = any(together(time.monotonic() > args.deadline))
        if late or (case.engine == "fsdp2" and args.gpus == 1):
            continue
        add(measure_case(case, args, device))
    if "longest" in args.only and not any(together(time.monotonic() > args.deadline)):
        add(longest(args, device))
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", nargs="+", default=list(GROUPS), choices=GROUPS, help="groups of cases")
    add("--engines", nargs="+", choices=("ddp", "fsdp2", "sequence"), help="of the groups")
    add("--lengths", nargs="+", type=int, help="in place of the groups' own")
    add("--warm-up", type=int, default=2, help="steps before those that are timed")
    add("--steps", type=int, default=3, help="timed steps")
    add("--cap", type=float, default=80.0, help="GiB a GPU, for the longest sequence")
    add("--time-budget", type=float, default=float("inf"), help="seconds; no case begins after it")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--output", type=Path, help="default: benchmarks/results/GPU/bench_scaling.json")
    add("--append", action="store_true", help="keep the output's rows that are not measured again")
    add("--tiny", action="store_true", help="tiny models on the CPU: does the script run?")
    args = parser.parse_args(argv)
    cases = [case for group in args.only for case in GROUPS[group]]
    if args.engines:
        cases = [case for case in cases if case.engine in args.engines]
    lengths = [TINY_TOKENS] if args.tiny else args.lengths
    if lengths:
        values = [{**vars(case), "tokens": tokens} for case in cases for tokens in lengths]
        cases = list(dict.fromkeys(Case(**value) for value in values))
    args.cases, args.deadline = cases, time.monotonic() + args.time_budget
    args.command = command_line("bench_scaling.py", argv)
    if "WORLD_SIZE" in os.environ:
        launcher = f"torchrun --nproc_per_node {os.environ['WORLD_SIZE']}"
        args.command = args.command.replace("python", launcher, 1)
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    if not (args.tiny or torch.cuda.is_available()):
        raise SystemExit("bench_scaling.py measures on CUDA GPUs, and there is none.")
    rows = run(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if any(row["status"].startswith("failed") for row in rows):
        raise SystemExit("Some cases failed; see above.")


if __name__ == "__main__":
    main()
