"""Run groups of the quality benchmark, a worker on each GPU; jobs that are done are not repeated.

Each job's row is added to ``results.jsonl`` in the output folder as soon as it ends.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality.cases import GROUPS, jobs_of
from benchmarks.quality.results import RESULTS, read_rows
from benchmarks.quality.tables import short_table
from benchmarks.quality.workers import Queue, Setup, starter
from benchmarks.record import environment


def main(argv: Sequence[str] | None = None) -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of results.jsonl and the workers' logs")
    add("--base", type=Path, required=True, help="directory made by make_base.py")
    add("--texts", type=Path, required=True, help="folder made by prepare.py")
    add("--group", nargs="+", required=True, choices=GROUPS)
    add("--jobs", nargs="+", metavar="PART", help="those alone whose names hold one of these")
    add("--predictor", help="directory of a trained predictor: adds its arms")
    add("--minutes", type=float, default=math.inf, help="for all; none starts that cannot end")
    add("--rows", type=int, default=24, help="that an evaluation asks, of each length")
    add("--windows", type=int, default=8, help="of plain text in an evaluation")
    add("--processes", type=int, default=4, help="that make rows, for each GPU")
    add("--threads", type=int, default=4, help="of PyTorch, for each GPU")
    add("--tokens", type=int, help="of a row in every job, for a trial on a CPU")
    add("--cpu", action="store_true")
    add("--commit", default="unknown")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in read_rows([args.out]) if row["status"] == "ok"}
    jobs = [
        job
        for job in jobs_of(args.group, args.predictor, args.tokens)
        if job.name not in done and (not args.jobs or any(part in job.name for part in args.jobs))
    ]
    setup = Setup(
        args.base,
        args.texts,
        args.out,
        args.cpu,
        args.threads,
        args.processes,
        args.rows,
        args.windows,
    )
    here = environment(torch.device("cpu" if args.cpu else "cuda")) | {"commit": args.commit}
    gpus = 1 if args.cpu else torch.cuda.device_count()
    expected = sum(job.expected for job in jobs)
    print(f"{len(jobs)} jobs, {expected / 60 / gpus:.1f} minutes on {gpus}, {len(done)} are done")
    queue = Queue(starter(setup), gpus, begin + 60 * args.minutes)
    with open(args.out / RESULTS, "a", encoding="utf-8") as file:
        for row in queue.run(jobs):
            file.write(json.dumps({**here, **row}) + "\n")
            file.flush()
            took = row.get("train_seconds", 0), row.get("overhead_seconds", 0)
            print(
                f"{time.monotonic() - begin:5.0f} s  {row['name']}: {row['status']}, "
                f"{took[0]:.0f} + {took[1]:.0f} s, {row.get('steps')} steps of "
                f"{row.get('step_ms')} ms, {row.get('peak_gib')} GiB",
                flush=True,
            )
    print(short_table(read_rows([args.out])))


if __name__ == "__main__":
    main()
