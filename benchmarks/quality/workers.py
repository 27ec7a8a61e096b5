"""Jobs on processes: several on each GPU, each of which loads libraries and data once.

A job that fails is a row that says so. A process that dies is replaced.
"""

import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from benchmarks.quality.job import Job

SPAWN = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
GRACE = 5.0  # seconds that a process has to end by itself


def serve(
    connection: Connection, base: Path, folder: Path, log: Path, tiny: bool, threads: int
) -> None:
    """Run jobs that arrive by ``connection`` until None does; the body of a process."""
    with open(log, "a", encoding="utf-8") as file:  # of libraries, which know no other way
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    from transformers.utils import logging

    from benchmarks.quality.data import Data
    from benchmarks.quality.experiment import run_job

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    device = torch.device("cpu" if tiny or not torch.cuda.is_available() else "cuda")
    data = Data.load(folder)
    connection.send("ready")
    while (job := connection.recv()) is not None:
        fatal = False
        try:
            row = run_job(job, base, data, device)
        except torch.cuda.OutOfMemoryError:
            row = {**job.to_dict(), "status": "out of memory"}
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
            row = {**job.to_dict(), "status": f"failed: {reason}"}
            fatal = "CUDA" in str(error)  # whose context does not recover
        if device.type == "cuda" and not fatal:
            torch.cuda.empty_cache()
        connection.send(row | {"fatal": True} if fatal else row)
        if fatal:
            return


@dataclass
class Worker:
    """A process and what it is doing.

    Attributes:
        gpu: Its device's number.
        process: The process.
        connection: To it.
        ready: It has loaded everything.
        job: What it runs, or None.
        since: When that began.
    """

    gpu: int
    process: multiprocessing.Process
    connection: Connection
    ready: bool = False
    job: Job | None = None
    since: float = 0.0

    @property
    def idle(self) -> bool:
        """It waits for a job."""
        return self.ready and self.job is None

    def stop(self) -> None:
        """End the process, by force if it does not end by itself."""
        with suppress(OSError):  # it is gone already
            self.connection.send(None)
        if self.job is not None or not self.ready:
            self.process.terminate()
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Estimate:
    """Expected seconds of jobs, corrected by those that have ended.

    Args:
        row_tokens: Of each training set.
        workers_per_gpu: Jobs that share a GPU.
    """

    FIXED, TOKEN = 4.0, 2.5e-6  # seconds a job and a token, dense, of the 22 M model on an H200
    SHARED = 0.6  # what each further job on a GPU adds to another's time, before it is known

    def __init__(self, row_tokens: dict[str, int], workers_per_gpu: int):
        self.row_tokens, self.ratios = row_tokens, []
        self.at_first = 1 + self.SHARED * (workers_per_gpu - 1)

    def __call__(self, job: Job) -> float:
        """Expected seconds."""
        if job.exclusive:
            return self._naive(job)
        ratios = sorted(self.ratios)
        return self._naive(job) * (ratios[len(ratios) * 3 // 4] if ratios else self.at_first)

    def learn(self, job: Job, seconds: float) -> None:
        """What a job took."""
        if not job.exclusive:
            self.ratios.append(seconds / self._naive(job))

    def _naive(self, job: Job) -> float:
        kept = 1.0
        if job.lemo is not None and job.kind == "plain":
            share = job.lemo.get("retention", 0.5)
            kept = 0.2 + 0.8 * share if isinstance(share, float) else 1.0
        return self.FIXED + self.TOKEN * kept * job.steps * job.batch * self.row_tokens[job.data]


class Queue:
    """Runs jobs and yields their rows as they end.

    Args:
        start: Makes the process and the connection of a worker of a GPU.
        gpus: How many there are; at least one, which may be the CPU.
        workers_per_gpu: Processes on each.
        estimate: Of a job's seconds.
        end: Time (`time.monotonic`) beyond which no job is to run.
    """

    def __init__(
        self,
        start: Callable[[int], Worker],
        gpus: int,
        workers_per_gpu: int,
        estimate: Estimate,
        end: float,
    ):
        self.start, self.estimate, self.end = start, estimate, end
        self.workers = [start(gpu) for _ in range(workers_per_gpu) for gpu in range(gpus)]
        self.rows: dict[str, dict] = {}

    def run(self, jobs: list[Job], rows: list[dict]) -> Iterator[dict]:
        """Rows of ``jobs`` in the order in which they end; ``rows``: those of earlier runs.

        A job for which there is no time, and one whose timing failed, has no row.
        """
        self.rows = {row["name"]: row for row in rows}
        waiting = list(jobs)
        try:
            while True:
                self._assign(waiting)
                if all(worker.idle for worker in self.workers):
                    return  # what still waits never can run
                open_ends = [worker.connection for worker in self.workers if not worker.idle]
                left = self.end - time.monotonic()
                ended = wait(open_ends, None if math.isinf(left) else max(0.0, left))
                if not ended:
                    break
                for worker in list(self.workers):
                    if worker.connection in ended and (row := self._receive(worker)) is not None:
                        self.rows[row["name"]] = row
                        yield row
            for worker in self.workers:
                if worker.job is not None:
                    yield {**worker.job.to_dict(), "status": "out of time"}
        finally:
            for worker in self.workers:
                worker.stop()

    def _assign(self, waiting: list[Job]) -> None:
        for worker in self.workers:
            if not worker.idle:
                continue
            beside = [w for w in self.workers if w.gpu == worker.gpu and w is not worker]
            if any(w.job is not None and w.job.exclusive for w in beside):
                continue
            fitting = [job for job in waiting if self._has_time(job)]
            # Or others would always be under way where a job is to be alone.
            first = [job for job in fitting if job.exclusive] or fitting
            if not first or (first[0].exclusive and not all(w.idle for w in beside)):
                continue
            job = first[0]
            waiting.remove(job)
            worker.job, worker.since = self._resolved(job), time.monotonic()
            worker.connection.send(worker.job)

    def _has_time(self, job: Job) -> bool:
        job = self._resolved(job)
        return job is not None and time.monotonic() + self.estimate(job) <= self.end

    def _resolved(self, job: Job) -> Job | None:
        """``job`` with the steps that its ``same_time`` asks for; None before they are known."""
        if job.same_time is None:
            return job
        timings = [self.rows.get(name, {}).get("step_ms") for name in job.same_time]
        if None in timings:
            return None
        return replace(job, steps=round(job.steps * timings[0] / timings[1]))

    def _receive(self, worker: Worker) -> dict | None:
        """What a worker has to say: a row, or None if it is ready now."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            message = None
        if message == "ready":
            worker.ready = True
            return None
        job, worker.job = worker.job, None
        if message is None:
            worker.process.join(GRACE)
            if job is None and not worker.ready:
                raise RuntimeError(
                    f"a worker could not start (exit code {worker.process.exitcode})."
                )
            self._replace(worker)
            if job is None:
                return None
            code = worker.process.exitcode
            return {**job.to_dict(), "status": f"failed: its process ended with {code}"}
        if message.pop("fatal", False):
            worker.stop()
            self._replace(worker)
        self.estimate.learn(job, time.monotonic() - worker.since)
        return message

    def _replace(self, worker: Worker) -> None:
        self.workers[self.workers.index(worker)] = self.start(worker.gpu)


def starter(
    base: Path, folder: Path, logs: Path, tiny: bool, threads: int
) -> Callable[[int], Worker]:
    """What makes workers on one model and one folder of data."""

    def start(gpu: int) -> Worker:
        here, there = SPAWN.Pipe()
        log = logs.with_name(f"{logs.name}.gpu{gpu}.log")
        arguments = (there, base, folder, log, tiny, threads)
        with _sees(gpu):
            process = SPAWN.Process(target=serve, args=arguments, daemon=True)
            process.start()
        there.close()
        return Worker(gpu, process, here)

    return start


@contextmanager
def _sees(gpu: int) -> Iterator[None]:
    """A process started inside sees this GPU alone, as number 0."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = before.split(",") if before else None
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
