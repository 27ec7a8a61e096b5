"""The longest sequence of one optimizer step, by provider and by memory of the GPU.

First each provider's dry step is compared with its real one. Then, under each cap, dry steps search
for a length that fits while one 4 % longer does not. Last come real steps at chosen lengths.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from dry_host import HOST_LIMIT
from longest_search import STEP, Search, search_longest
from model_shapes import LORA, WIDE, model_config
from providers import PROVIDERS, lemo_config, provider_of
from quantized_base import BITS, Base
from record import GIB, command_line, earlier_rows, environment, matmul_tflops, save, summary
from steps import Bench, Dry, LeftBehind

from lemo_hf.planning.plan import Planner

RESULTS = Path(__file__).parent / "results"
MODEL = "Llama-3 8B"
VERIFIED_AT = (16384, 32768)
CAPS = ("24", "80", "whole")
SHARE = 0.5  # of the matmul's speed, by which the time of a step is guessed
AGAIN = 75  # exit status: run again with --resume (EX_TEMPFAIL)
MAY_DIFFER = ("date", "commands", "commit", "matmul_tflops")
DEFAULT = (
    "hf+checkpointing",
    "hf+checkpointing+offload",
    "liger+checkpointing",
    "liger+checkpointing+offload",
    "lemo+checkpointing",
    "lemo+offload",
)
QUANTIZED = ("hf+checkpointing", "lemo+checkpointing", "lemo+offload")


class Longest:
    """The run: its model, its rows, and its file."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.header = {
            **environment(device),
            "commit": args.commit,
            "model": MODEL,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or "default",
            "lora": args.lora,
            "matmul_tflops": matmul_tflops(device),
            "host_limit_gib": HOST_LIMIT / GIB,
            "commands": [args.command],
        }
        base = args.base
        if base.name:
            self.header["base"] = base.name
        slug = self.header["gpu"].lower().replace(" ", "-")
        if args.labels is not None:
            self.header["labels"] = args.labels
        kind = "completion" if args.labels else ""
        name = "_".join(filter(None, ("bench_longest", kind, base.name)))
        self.path = args.output or RESULTS / slug / f"{name}.json"
        self.kept: list[dict] = []
        if (args.append or args.resume) and self.path.exists():
            self.kept = earlier_rows(self.path, self.header, MAY_DIFFER)
        self.rows: list[dict] = []
        self.step = 64 if args.tiny else STEP
        self.verified_at = [tokens // 64 if args.tiny else tokens for tokens in VERIFIED_AT]
        most = 4096 if args.tiny else 2**21
        self.bench = Bench(MODEL, most, device, args.tiny, args.lemo, base, args.labels)
        self.total = torch.cuda.mem_get_info()[1] if device.type == "cuda" else 16 * GIB
        self.dry_peaks: dict[str, dict[int, float]] = {}

    def write(self, row: dict) -> None:
        """Add a row to the file, in place of an earlier one of that key."""
        self.rows.append(row)
        new = {key_of(row) for row in self.rows}
        kept = [row for row in self.kept if key_of(row) not in new]
        save(self.path, self.header, kept + self.rows)
        print(json.dumps({k: v for k, v in row.items() if k != "config"}), flush=True)

    def late(self) -> bool:
        """Whether the time budget is used up."""
        return time.monotonic() > self.args.deadline

    def row(self, part: str, provider: str, **values) -> dict:
        """What every row says first."""
        config = lemo_config(provider_of(provider), self.args.lemo)
        return {
            "part": part,
            "provider": provider,
            "retention": None if config is None else config.retention,
            **values,
            "config": None if config is None else config.to_dict(),
        }

    def planned(self, name: str, tokens: int | None, cap_gib: float = 0.0) -> dict:
        """What the memory plan expects: a peak at ``tokens``, or the longest under the cap."""
        provider = provider_of(name)
        if provider.kind == "s2attn" or provider.equal_shares:
            return {}
        config = model_config(MODEL, tiny=self.args.tiny)
        lemo = lemo_config(provider, self.args.lemo)
        settings = self.args.base.plan_settings | {
            "lora_rank": self.args.lora["r"],
            "lora_targets": self.args.lora["target_modules"],
            "gradient_checkpointing": provider.checkpointing,
            "stock_offload": provider.offload,
            "labels": self.args.labels,
        }
        planner, fused = Planner(config, **settings), provider.kind == "liger"
        if tokens is not None:
            found = planner.plan(lemo, tokens, fused=fused)
            return {"planned_gib": round(found.peak / GIB, 3)}
        longest = planner.longest(lemo, cap_gib * GIB, "fused" if fused else None)
        return {"planned_longest": longest}

    def verify(self) -> None:
        """Peaks of dry steps beside those of real ones."""
        for name in self.args.providers:
            for tokens in self.verified_at:
                if self.late():
                    return
                provider = provider_of(name)
                dry = self.bench.dry(provider, tokens)
                self._note(name, tokens, dry)
                real = self.bench.real(provider, tokens, False, dry)
                row = self.row("verify", name, tokens=tokens, dry=dry.status)
                row |= {"dry_gib": dry.peak_gib, "dry_reserved_gib": dry.reserved_gib}
                row |= self.planned(name, tokens)
                row["status"] = real if isinstance(real, str) else "ok"
                if row["status"] == "ok" == dry.status:
                    row |= {key: round(real[key], 3) for key in ("peak_gib", "reserved_gib")}
                    row["dry_host_gib"] = dry.host_gib
                    row["off"] = round(dry.peak_gib / max(row["peak_gib"], 1e-9) - 1, 5)
                if dry.uncalibrated:
                    row["uncalibrated"] = dry.uncalibrated
                self.write(row)

    def _note(self, name: str, tokens: int, dry: Dry) -> None:
        if dry.status == "ok":
            self.dry_peaks.setdefault(name, {})[tokens] = dry.peak_gib

    def cap(self, cap: str) -> float:
        """Limit the process to ``cap``; GiB."""
        share = 1.0 if cap == "whole" else min(1.0, float(cap) * GIB / self.total)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(share)
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            return min(share * self.total, free) / GIB
        return share * self.total / GIB

    def trial(self, cap: str, name: str, tokens: int) -> tuple[str, float]:
        """Status and peak of a dry step."""
        dry = self.bench.dry(provider_of(name), tokens)
        self._note(name, tokens, dry)
        status = dry.status
        if status == "ok" and dry.host_gib * GIB > HOST_LIMIT:
            status = "host memory"
        print(f"  {cap} {name} {tokens}: {status} {dry.peak_gib:.2f} GiB", flush=True)
        return status, dry.peak_gib

    def search(self) -> None:
        """The longest length of each provider under each cap."""
        for cap in self.args.caps:
            for name in self.args.providers:
                if self.late():
                    break
                earlier = self.earlier(name, cap)
                if earlier and earlier["status"] == "ok":
                    continue
                cap_gib = self.cap(cap)
                start, try_at = time.monotonic(), partial(self.trial, cap, name)
                self.cap("whole")
                for tokens in self.verified_at:
                    if tokens not in self.dry_peaks.get(name, {}):
                        try_at(tokens)
                self.cap(cap)
                known = self.dry_peaks.get(name, {})
                # At other lengths and caps a provider may have stored something else.
                known = {tokens: known[tokens] for tokens in self.verified_at if tokens in known}
                found = Search(self.step, known)
                for key in ("fits", "too_long", "limit", "trials") if earlier else ():
                    setattr(found, key, earlier[key])
                if found.fits:
                    found.peaks[found.fits] = earlier["peak_gib"]
                left_behind = None
                try:
                    search_longest(found, try_at, cap_gib, self.args.deadline)
                except LeftBehind as error:
                    left_behind = error
                row = self.row("longest", name, cap=cap, cap_gib=round(cap_gib, 2))
                row["status"] = "ok" if found.done else "not finished"
                row |= {"fits": found.fits, "too_long": found.too_long, "limit": found.limit}
                row["peak_gib"] = found.peaks.get(found.fits)
                row |= self.planned(name, None, cap_gib)
                row |= {"trials": found.trials, "seconds": round(time.monotonic() - start, 1)}
                self.write(row)
                if left_behind:
                    raise left_behind
        self.cap("whole")

    def earlier(self, provider: str, cap: str) -> dict | None:
        """What a run to be resumed has found."""
        key = "longest", provider, cap, None
        rows = (row for row in self.kept if self.args.resume and key_of(row) == key)
        return next(rows, None)

    def real(self) -> None:
        """Real steps; ``PROVIDER@TOKENS`` or ``PROVIDER@TOKENS@CAP``."""
        for text in self.args.real:
            name, tokens, cap = (*text.split("@"), "whole")[:3]
            provider, tokens = provider_of(name), int(tokens)
            row = self.row("real", name, cap=cap, tokens=tokens)
            row["cap_gib"] = round(self.cap(cap), 2)
            dry = self.bench.dry(provider, tokens)
            guess = dry.flops / (SHARE * 1e12 * self.header["matmul_tflops"])
            row |= {"flops": dry.flops, "dry_gib": dry.peak_gib}
            if dry.status != "ok":
                row["status"] = dry.status
            elif time.monotonic() + guess > self.args.deadline:
                row["status"] = f"not run: time budget (a step takes about {guess:.0f} s)"
            else:
                # The dry step before it has compiled the kernels and filled the cache.
                sample = self.bench.real(provider, tokens, False, dry)
                row["status"] = sample if isinstance(sample, str) else "ok"
                row["dry_host_gib"] = dry.host_gib
                if row["status"] == "ok":
                    row |= summary([sample], tokens)
                    row["tflops"] = round(1e-9 * dry.flops / row["ms_median"], 1)
                    row["share_of_matmul"] = round(row["tflops"] / self.header["matmul_tflops"], 3)
            self.write(row)
        self.cap("whole")


def key_of(row: dict) -> tuple:
    """What makes a row unique."""
    return row["part"], row["provider"], row.get("cap"), row.get("tokens")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--parts", nargs="+", default=["verify", "search"], choices=["verify", "search", "real"])
    add("--providers", nargs="+", metavar="NAME", help=str(list(PROVIDERS)))
    add("--quantized", choices=list(BITS), help="the base's weights, by bitsandbytes; else bf16")
    add("--kbit-training", action="store_true", help="then prepare it by PEFT: fp32 stream")
    add("--wide", action="store_true", help="LoRA of rank 32 on all linears, in place of 8 on four")
    add("--caps", nargs="+", default=CAPS, help="GiB, or whole")
    add("--real", nargs="+", default=[], metavar="PROVIDER@TOKENS[@CAP]", help="for --parts real")
    add("--lemo", type=json.loads, default={}, help="fields of LeMoConfig for all LeMo providers")
    add("--time-budget", type=float, default=float("inf"), help="seconds; no trial begins after it")
    add("--labels", type=int, help="on the last tokens of a row; default: on all")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--output", type=Path, help="default: benchmarks/results/GPU/bench_longest.json")
    add("--append", action="store_true", help="keep the output's rows that are not measured again")
    add("--resume", action="store_true", help="as --append, and go on with unfinished searches")
    add("--tiny", action="store_true", help="a tiny model on the CPU: does the script run?")
    args = parser.parse_args(argv)
    args.base = Base(args.quantized, args.kbit_training, args.wide)
    args.lora = WIDE if args.wide else LORA
    if args.kbit_training and args.quantized is None:
        parser.error("--kbit-training prepares a quantised base: give --quantized nf4")
    if args.quantized == "int8" and "search" in args.parts:
        # LLM.int8 makes room for outliers, which a dry step's garbage is full of.
        parser.error("dry steps of int8 weights mean nothing: give --parts verify or real")
    args.providers = args.providers or (QUANTIZED if args.quantized else DEFAULT)
    for name in [*args.providers, *(text.split("@")[0] for text in args.real)]:
        try:
            kind = provider_of(name).kind
        except ValueError as error:
            parser.error(str(error))
        if (args.quantized or args.wide) and kind == "liger":
            parser.error(f"{name} runs on 16-bit weights with LoRA on four linears: leave it out")
    args.deadline = time.monotonic() + args.time_budget
    args.command = command_line("bench_longest.py", argv)
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    if not (args.tiny or torch.cuda.is_available()):
        raise SystemExit("bench_longest.py measures on a CUDA GPU, and there is none.")
    torch.manual_seed(0)
    run = Longest(args, torch.device("cpu" if args.tiny else "cuda"))
    for part in args.parts:
        try:
            getattr(run, part)()
        except LeftBehind as error:
            print(f"{error}: run again with --resume", flush=True)
            raise SystemExit(AGAIN) from None


if __name__ == "__main__":
    main()
