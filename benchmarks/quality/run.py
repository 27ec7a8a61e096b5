"""Run groups of the quality benchmark on all GPUs; a JSON is written after every job."""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks.quality.cases import RECIPE, Cases, chosen_jobs, read_recipe, tiny
from benchmarks.quality.data import read_header
from benchmarks.quality.workers import Estimate, Queue, starter
from benchmarks.record import command_line, earlier_rows, environment, save

MAY_DIFFER = ("date", "commit", "commands", "workers_per_gpu", "gpus", "recipe")


def short(row: dict) -> str:
    """A row in one line."""
    if row["status"] != "ok":
        return f"{row['name']}: {row['status']}"
    parts = [row["name"], f"{row['seconds']:.0f} s"]
    if row.get("step_ms") is not None:
        parts.append(f"{row['steps']} × {row['step_ms']:.0f} ms")
        parts.append(f"kept {row['attention_retention']:.2f}/{row['mlp_retention']:.2f}")
    if row.get("peak_gib") is not None:
        parts.append(f"{row['peak_gib']:.1f} GiB")
    if "perplexity" in row:
        parts.append(" ".join(f"{name} {value:.2f}" for name, value in row["perplexity"].items()))
        found = row["retrieval"]["accuracy"]
        parts.append("found " + " ".join(f"{share:.2f}" for share in found.values()))
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    begin = time.monotonic()
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare.py")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="JSON file")
    parser.add_argument("--predictor", help="directory of a trained predictor")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="default: all but recipe")
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="of those, these alone")
    parser.add_argument("--workers-per-gpu", type=int, default=2)
    parser.add_argument("--time-budget", type=float, default=math.inf, help="seconds, for all")
    parser.add_argument("--append", action="store_true", help="keep the rows of --output")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, a few steps a job")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args(argv)
    header_of_data = read_header(args.data)
    recipe = read_recipe(args.recipe)
    layers = AutoConfig.from_pretrained(args.model).num_hidden_layers
    groups = Cases(recipe, args.predictor, layers).groups()
    names = args.only or [name for name in groups if name != "recipe"]
    unknown = sorted(set(names) - set(groups))
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(groups)}.")
    jobs = chosen_jobs(groups, names)
    if args.jobs:
        jobs = [job for job in jobs if job.name in args.jobs]
    jobs = [tiny(job) for job in jobs] if args.tiny else jobs
    sets = header_of_data["sets"]
    missing = sorted({job.data for job in jobs} - set(sets))
    if missing:
        parser.error(f"{args.data} lacks the sets {', '.join(missing)}: make them with prepare.py.")
    on_gpu = torch.cuda.is_available() and not args.tiny
    gpus = torch.cuda.device_count() if on_gpu else 1
    header = {
        **environment(torch.device("cuda" if on_gpu else "cpu")),
        "commit": args.commit,
        "gpus": gpus,
        "workers_per_gpu": args.workers_per_gpu,
        "data": header_of_data,
        "recipe": recipe,
        "commands": [_command(argv)],
    }
    rows = earlier_rows(args.output, header, MAY_DIFFER) if args.append else []
    done = {row["name"]: row for row in rows if row["status"] == "ok"}
    jobs = [job for job in jobs if not (job.name in done and job.same_run(done[job.name]))]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // (gpus * args.workers_per_gpu)) if on_gpu else 1
    queue = Queue(
        starter(args.model, args.data, args.output, not on_gpu, threads),
        gpus,
        args.workers_per_gpu,
        Estimate({name: s["row_tokens"] for name, s in sets.items()}, args.workers_per_gpu),
        begin + args.time_budget,
    )
    ended = 0
    for row in queue.run(jobs, rows):
        ended += 1
        row["groups"] = [
            name for name in groups if any(j.name == row["name"] for j in groups[name])
        ]
        row["workers_on_gpu"] = 1 if row["exclusive"] else args.workers_per_gpu
        rows = [old for old in rows if old["name"] != row["name"]] + [row]
        save(args.output, header, rows)
        print(f"{time.monotonic() - begin:4.0f} s  {ended}/{len(jobs)}  {short(row)}", flush=True)
    if ended < len(jobs):
        print(f"{len(jobs) - ended} jobs did not start: no time, or a timing they need is missing")


def _command(argv: list[str]) -> str:
    script = "quality/run.py"  # a module of the repository's root, so that it finds its neighbours
    return command_line(script, argv).replace(f"benchmarks/{script}", "-m benchmarks.quality.run")


if __name__ == "__main__":
    main()
