"""Whole optimizer steps: Hugging Face + PEFT, Liger and S2-Attn against lemo-hf.

One set of weights serves all providers. They take turns, so that a drift of the machine meets all
of them. First each takes a dry step (`dry_steps.py`), which gives the operations it does, its
memory, and whether it fits; then a turn empties the allocator's cache, takes one step that is not
timed, and times the next. Where a step is long, a dry one stands in for the former.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from cases import GROUPS, Case
from model_shapes import LORA, SHAPES
from providers import PROVIDERS, lemo_config, provider_of, provider_on
from record import command_line, earlier_rows, environment, matmul_tflops, save, summary
from steps import Bench, Dry, print_kernels, train_step

from lemo_hf import LeMoConfig

RESULTS = Path(__file__).parent / "results"
MAY_DIFFER = ("date", "commands", "commit", "matmul_tflops", "beside_attention")
SHARE = 0.5  # of the matmul's speed, by which the time of a step is guessed
LONG_STEP = 5.0  # seconds, from which a dry step warms up
TINY_TOKENS = 256


def measure_case(
    bench: Bench, case: Case, args: argparse.Namespace, header: dict, too_long: dict[str, int]
) -> Iterator[list[dict]]:
    """The rows of one case, one a provider, after the dry steps and after each round."""
    dry: dict[str, Dry] = {}
    status: dict[str, str] = {}
    samples: dict[str, list] = {name: [] for name in case.providers}
    for name in case.providers:
        if case.tokens > too_long.get(name, case.tokens):
            status[name] = f"not run: OOM at {too_long[name]}"
        elif time.monotonic() > args.deadline:
            status[name] = "not run: time budget"
        else:
            dry[name] = bench.dry(provider_of(name), case.tokens)
            if dry[name].status != "ok":
                status[name] = dry[name].status

    def rows() -> list[dict]:
        return [
            row_of(case, name, samples[name], status.get(name), dry.get(name), args, header)
            for name in case.providers
        ]

    yield rows()
    for _ in range(0 if args.dry_only else case.rounds):
        for name in case.providers:
            if name in status and status[name] != "ok":
                continue
            guess = dry[name].flops / (SHARE * 1e12 * header["matmul_tflops"])
            if guess > args.step_limit:
                status[name] = f"not run: a step would take more than {args.step_limit:.0f} s"
                continue
            steps = 1 if guess > LONG_STEP else 2
            if time.monotonic() + steps * guess > args.deadline:
                continue
            provider = provider_of(name)
            if steps == 1:
                bench.dry(provider, case.tokens)
            result = bench.real(provider, case.tokens, steps == 2, dry[name])
            if isinstance(result, str):
                status[name] = result
            else:
                samples[name].append(result)
        yield rows()


def row_of(
    case: Case,
    name: str,
    samples: list[dict],
    status: str | None,
    dry: Dry | None,
    args: argparse.Namespace,
    header: dict,
) -> dict:
    """One row of the file."""
    provider = provider_of(name)
    config = lemo_config(provider, args.lemo)
    row = {"group": case.group, "model": case.model, "tokens": case.tokens, "provider": name}
    row["retention"] = None if config is None else config.retention
    row["checkpointing"], row["transformers_offload"] = provider.checkpointing, provider.offload
    row["status"] = status or ("ok" if samples else "not run: time budget")
    if row["status"] == "ok":
        row |= summary(samples, case.tokens)
    if dry is not None and dry.status == "ok":
        row |= {"dry_peak_gib": dry.peak_gib, "dry_host_gib": dry.host_gib, "flops": dry.flops}
        if dry.uncalibrated:
            row["uncalibrated"] = dry.uncalibrated
        if row["status"] == "ok":
            row["tflops"] = round(1e-9 * dry.flops / row["ms_median"], 1)
            row["share_of_matmul"] = round(row["tflops"] / header["matmul_tflops"], 3)
    row["command"] = args.command
    return {**row, "config": None if config is None else config.to_dict()}


def run(args: argparse.Namespace, device: torch.device) -> list[dict]:
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
        "lora_dtype": "bfloat16",
        "matmul_tflops": matmul_tflops(device),
        "commands": [args.command],
    }
    print(f"bf16 matmul: {header['matmul_tflops']} TFLOP/s", flush=True)
    slug = header["gpu"].lower().replace(" ", "-")
    path = args.output or RESULTS / slug / "bench_step.json"
    kept = earlier_rows(path, header, MAY_DIFFER) if args.append and path.exists() else []
    done: list[dict] = []
    for title in dict.fromkeys(case.model for case in args.cases):
        cases = [case for case in args.cases if case.model == title]
        if time.monotonic() > args.deadline:
            break
        longest = max(case.tokens for case in cases)
        bench = Bench(title, longest, device, args.tiny, args.lemo)
        header["beside_attention"] = header.get("beside_attention", {}) | {title: bench.beside}
        too_long: dict[str, int] = {}  # where a provider ran out of memory
        for case in cases:
            rows: list[dict] = []
            for rows in measure_case(bench, case, args, header, too_long):
                new = {key_of(row) for row in done + rows}
                save(path, header, [row for row in kept if key_of(row) not in new] + done + rows)
            done += rows
            for row in rows:
                print_row(row)
                if row["status"] == "oom":
                    shortest = too_long.get(row["provider"], case.tokens)
                    too_long[row["provider"]] = min(shortest, case.tokens)
            if args.profile and time.monotonic() < args.deadline:
                profile(bench, args.profile, case.tokens)
        bench.close()
    return done


def profile(bench: Bench, name: str, tokens: int) -> None:
    """Print the kernels of one step."""
    print(f"{name}, {tokens} tokens:", end=" ")
    with provider_on(bench.models, provider_of(name), bench.options) as (model, _):
        train_step(model, bench.optimizer, tokens)
        print_kernels(lambda: train_step(model, bench.optimizer, tokens))


def key_of(row: dict) -> tuple:
    """What makes a row unique."""
    return row.get("group"), row["model"], row["tokens"], row["provider"]


def print_row(row: dict) -> None:
    """One short line."""
    text = row["status"]
    if text == "ok":
        text = f"{row['ms_median']:7.0f} ms {row['peak_gib']:6.1f} GiB"
        text += f" {100 * row.get('share_of_matmul', 0):5.1f} %  loss {row['loss']:.2f}"
    if "dry_peak_gib" in row:
        text += f"  (dry {row['dry_peak_gib']:.1f} GiB, {row['flops'] / 1e12:.0f} TFLOP)"
    place = f"{row['group']:13s} {row['model']}  {row['tokens']:6d}"
    print(f"{place}  {row['provider']:28s}  {text}", flush=True)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; every field of `LeMoConfig` is an option too."""
    titles = {title.lower().replace(" ", "-"): title for title in SHAPES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", nargs="+", default=list(GROUPS), choices=GROUPS, help="groups of cases")
    add("--models", nargs="+", metavar="MODEL[:TOKENS,...]", help=f"of the groups: {list(titles)}")
    add("--lengths", nargs="+", type=int, help="of the groups")
    add("--providers", nargs="+", metavar="NAME", help=f"in place of theirs: {list(PROVIDERS)}")
    add("--rounds", type=int, help="turns of each provider, in place of the groups' own")
    add("--dry-only", action="store_true", help="memory and operations; nothing is timed")
    add("--step-limit", type=float, default=60, help="seconds; longer steps are not taken")
    add("--time-budget", type=float, default=float("inf"), help="seconds; no turn begins after it")
    add("--profile", nargs="?", const="lemo+checkpointing", metavar="PROVIDER", help="its kernels")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--output", type=Path, help="default: benchmarks/results/GPU/bench_step.json")
    add("--append", action="store_true", help="keep the output's rows that are not measured again")
    add("--tiny", action="store_true", help="tiny models on the CPU: does the script run?")
    fields = [f.name for f in dataclasses.fields(LeMoConfig)]
    for name in fields:
        add(f"--{name.replace('_', '-')}", type=_value, metavar="VALUE")
    args = parser.parse_args(argv)
    args.lemo = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    args.cases = list(_cases(args, titles, parser))
    if not args.cases:
        parser.error("no case of these groups has that model and length")
    args.deadline = time.monotonic() + args.time_budget
    args.command = command_line("bench_step.py", argv)
    return args


def _cases(args: argparse.Namespace, titles: dict, parser: argparse.ArgumentParser):
    """The cases of the groups, narrowed or changed by the options."""
    wanted: dict[str, list[int] | None] = {}
    for model in args.models or titles:
        slug, _, lengths = model.partition(":")
        if slug not in titles:
            parser.error(f"--models: {slug!r} is none of {', '.join(titles)}")
        wanted[titles[slug]] = [int(x) for x in lengths.split(",")] if lengths else args.lengths
    for name in [*(args.providers or []), *filter(None, [args.profile])]:
        try:
            lemo_config(provider_of(name), args.lemo)
        except ValueError as error:
            parser.error(str(error))
    for group in args.only:
        for case in GROUPS[group]:
            if case.model not in wanted or case.tokens not in (wanted[case.model] or [case.tokens]):
                continue
            case = replace(case, rounds=args.rounds or case.rounds)
            case = replace(case, providers=tuple(args.providers or case.providers))
            yield replace(case, tokens=TINY_TOKENS) if args.tiny else case


def _value(text: str):
    """A number, true or false as JSON writes them; any other text as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    args = parse_args(sys.argv[1:])
    if not (args.tiny or torch.cuda.is_available()):
        raise SystemExit("bench_step.py measures on a CUDA GPU, and there is none.")
    rows = run(args, torch.device("cpu" if args.tiny else "cuda"))
    if any(row["status"].startswith("failed") for row in rows):
        raise SystemExit("Some providers failed; see above.")


if __name__ == "__main__":
    main()
