"""Kernels against what they replace: time, share of the machine's ceilings, memory.

Providers of a case take turns, so that a drift of the machine meets all of them. What a provider
raises becomes its row's status; the other rows go on. The file is written anew after each round.
"""

import argparse
import faulthandler
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import kernel_cases
import matmul_cases
import torch
from kernel_cases import Call, Case, DoesNotFit
from record import command_line, earlier_rows, environment, save

RESULTS = Path(__file__).parent / "results"
KERNELS = {
    "rows": kernel_cases.row_cases,
    "movement": kernel_cases.movement_cases,
    "gated_activation": kernel_cases.gated_cases,
    "rotary": kernel_cases.rotary_cases,
    "segment_cross_entropy": matmul_cases.loss_cases,
}
RIVALS = ("liger_kernel", "cut_cross_entropy")
MAY_DIFFER = ("date", "commands", "commit", "ceilings")  # between the runs of one file
ROUNDS = 5
TURN_MS = 20.0  # calls of a turn add up to about this, but are 20 at most
LONG_MS = 50.0  # a turn of shorter calls begins with one that is not timed
GRACE = 60  # seconds past the budget after which a run that hangs is ended
COPY_BYTES, MATMUL = 2**31, 8192


def time_calls(call: Call, count: int) -> list[float]:
    """ms of each of ``count`` calls, by CUDA events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def measure_once(call: Call) -> tuple[float, int, int]:
    """ms of one call, the most bytes allocated during it, and how many of them were not before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (ms,) = time_calls(call, 1)
    peak = torch.cuda.max_memory_allocated()
    return ms, peak, peak - before


def take_turn(call: Call, estimate: float) -> list[float]:
    """ms of several calls, each of about ``estimate`` ms."""
    if estimate < LONG_MS:
        call()
    return time_calls(call, max(1, min(20, int(TURN_MS / estimate))))


def measure_ceilings() -> dict[str, float]:
    """What a copy and a bf16 matrix product reach here: medians of 20."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=kernel_cases.DEVICE)
    target = torch.empty_like(source)
    left, right = (kernel_cases.normal(MATMUL, MATMUL) for _ in range(2))
    ms = []
    for call in (partial(target.copy_, source), partial(torch.mm, left, right)):
        time_calls(call, 3)
        ms.append(statistics.median(time_calls(call, 20)))
    return {
        "copy_gb_per_s": round(2e-6 * COPY_BYTES / ms[0], 1),
        "matmul_tflops": round(2e-9 * MATMUL**3 / ms[1], 1),
    }


def why(error: Exception) -> str:
    """An exception as the status of a row."""
    text = str(error)
    if any(sign in text for sign in ("out of memory", "ALLOC_FAILED")):
        return "out of memory"
    if isinstance(error, DoesNotFit):
        return text
    if isinstance(error, ImportError):
        return f"not installed: {text[:200]}"
    traceback.print_exc()
    return f"failed: {type(error).__name__}: {text[:200]}"


def measure_case(case: Case, ceilings: dict[str, float], deadline: float) -> Iterator[list[dict]]:
    """The rows of one case, one a provider, after each round."""
    calls: dict[str, Call] = {}
    status: dict[str, str] = {}
    fields: dict[str, dict] = {name: {} for name in case.providers}
    samples: dict[str, list[float]] = {name: [] for name in case.providers}
    estimates: dict[str, float] = {}
    for name, build in case.providers.items():
        if time.monotonic() > deadline:
            continue
        try:
            call = build() if case.grad else torch.no_grad()(build())
            call()  # kernels compile, the allocator's cache fills
            estimates[name], peak, extra = measure_once(call)
            fields[name] = {
                "peak_mib": round(peak / 2**20, 1),
                "extra_mib": round(extra / 2**20, 1),
            }
            if case.inspect is not None:
                fields[name].update(case.inspect(call))
            calls[name] = call
        except Exception as error:  # one provider's failure must not cost the others' numbers
            status[name] = why(error)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if name in status or time.monotonic() > deadline:
                continue
            try:
                samples[name] += take_turn(call, estimates[name])
            except Exception as error:
                status[name] = why(error)
        rows = []
        for name, taken in samples.items():
            row = {"kernel": case.kernel, "shape": case.shape, "case": case.name, "provider": name}
            row["status"] = status.get(name, "ok" if taken else "not run: time budget")
            row.update(summary(case, name, taken, ceilings) if row["status"] == "ok" else {})
            rows.append({**row, **fields[name]})
        yield rows


def summary(
    case: Case, provider: str, taken: list[float], ceilings: dict[str, float]
) -> dict[str, float]:
    """Median, least and most ms, and what that is in bytes and operations a second."""
    median = statistics.median(taken)
    found = {
        "ms_median": round(median, 4),
        "ms_min": round(min(taken), 4),
        "ms_max": round(max(taken), 4),
        "calls": len(taken),
    }
    if case.elements is not None:
        rate = 2e-6 * case.elements / median  # bf16
        found["gb_per_s"] = round(rate, 1)
        found["share_of_copy"] = round(rate / ceilings["copy_gb_per_s"], 3)
    if provider in case.flops:
        found["tflops"] = round(1e-9 * case.flops[provider] / median, 1)
    return found


def run(args: argparse.Namespace) -> list[dict]:
    """Measure what ``args`` asks for.

    Returns:
        All rows.
    """
    torch.manual_seed(0)
    device = torch.device(kernel_cases.DEVICE)
    header = {
        **environment(device, ("torch", "triton", "transformers")),
        **{package: installed(package) for package in RIVALS},
        "commit": args.commit,
        "rounds": ROUNDS,
        "ceilings": measure_ceilings(),
        "commands": [args.command],
    }
    print(header["ceilings"], flush=True)
    path = args.output or RESULTS / header["gpu"].lower().replace(" ", "-") / "bench_kernels.json"
    kept = []
    if args.append and path.exists():
        earlier = earlier_rows(path, header, MAY_DIFFER)
        kept = [row for row in earlier if row["kernel"] not in args.only]
    done: list[dict] = []
    for kernel in args.only:
        rows: list[dict] = []
        try:
            free_memory()
            for case in KERNELS[kernel]():
                done, rows = done + rows, []
                for rows in measure_case(case, header["ceilings"], args.deadline):
                    save(path, header, kept + done + rows)
                for row in rows:
                    print_row(row)
                del case
                free_memory()
        except Exception as error:  # making the inputs
            row = {"kernel": kernel, "shape": "", "case": "inputs", "provider": "all"}
            rows = [*rows, {**row, "status": why(error)}]
        done += rows
        save(path, header, kept + done)
    return done


def installed(package: str) -> str:
    """Version of a rival's package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def free_memory() -> None:
    """Drop garbage, and what the allocator has cached."""
    gc.collect()
    torch.cuda.empty_cache()


def print_row(row: dict) -> None:
    """One short line."""
    text = row["status"]
    if text == "ok":
        names = ("gb_per_s", "share_of_copy", "tflops", "extra_mib", "saved_mib", "grad_error")
        rest = "  ".join(f"{name} {row[name]}" for name in names if name in row)
        text = f"{row['ms_median']:9.3f} ms  {rest}"
    print(f"{row['kernel']}  {row['case']}  {row['provider']:16s}  {text}", flush=True)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", nargs="+", default=list(KERNELS), choices=KERNELS, help="measure these alone")
    add("--time-budget", type=float, default=140, help="seconds; no turn begins after it")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--output", type=Path, help="default: benchmarks/results/GPU/bench_kernels.json")
    add("--append", action="store_true", help="keep the output's rows of other kernels")
    args = parser.parse_args(argv)
    args.deadline = time.monotonic() + args.time_budget
    args.command = command_line("bench_kernels.py", argv)
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py measures on a CUDA GPU, and there is none.")
    faulthandler.dump_traceback_later(args.time_budget + GRACE, exit=True)
    rows = run(args)
    faulthandler.cancel_dump_traceback_later()
    if any(row["status"].startswith("failed") for row in rows):
        raise SystemExit("Some providers failed; see above.")


if __name__ == "__main__":
    main()
