"""Jobs on processes, one a GPU, each of which loads libraries, texts and models once.

A job that fails is a row that says so. A process that dies is replaced.
"""

import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from benchmarks.quality.job import Job

SPAWN = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
GRACE = 5.0  # seconds that a process has to end by itself


@dataclass(frozen=True)
class Setup:
    """What workers start with.

    Attributes:
        base: Directory of the base model.
        texts: Folder of the token file.
        logs: Folder of a log for each GPU.
        cpu: Run on the CPU.
        threads: Of PyTorch in each process.
        processes: That make rows for each worker.
        rows: Of each length that an evaluation asks.
        windows: Of plain text in an evaluation.
    """

    base: Path
    texts: Path
    logs: Path
    cpu: bool = False
    threads: int = 4
    processes: int = 4
    rows: int = 24
    windows: int = 8


def serve(connection: Connection, setup: Setup, gpu: int) -> None:
    """Run jobs that arrive by ``connection`` until None does; the body of a process."""
    with open(setup.logs / f"gpu{gpu}.log", "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    from transformers.utils import logging

    from benchmarks.quality.experiment import Experiments
    from benchmarks.quality.feed import Feed

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(setup.threads)
    feed = Feed(setup.base, setup.texts, setup.processes)
    experiments = Experiments(setup, feed, torch.device("cpu" if setup.cpu else "cuda"))
    connection.send("ready")
    try:
        while (job := connection.recv()) is not None:
            row, fatal = _row(job, experiments)
            connection.send({**row, "gpu_number": gpu, "fatal": fatal})
            if fatal:
                return
    except EOFError:  # nobody waits for rows any more
        return
    finally:
        feed.close()


def _row(job: Job, experiments) -> tuple[dict, bool]:
    """A job's result, and whether its process can run no other."""
    import torch

    try:
        return experiments.run(job), False
    except torch.cuda.OutOfMemoryError:
        experiments.clear()
        return {**job.to_dict(), "status": "out of memory"}, False
    except Exception as error:
        traceback.print_exc()
        experiments.clear()
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        return {**job.to_dict(), "status": f"failed: {reason}"}, "CUDA" in str(error)


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


class Queue:
    """Runs jobs in their order and yields their rows as they end.

    Args:
        start: Makes the worker of a GPU.
        gpus: How many there are; at least one, which may be the CPU.
        end: Time (`time.monotonic`) beyond which no job is to run.
        overhead: Seconds of a job beside its training, until the first has ended.
    """

    def __init__(
        self, start: Callable[[int], Worker], gpus: int, end: float, overhead: float = 20.0
    ):
        self.start, self.end, self.overhead = start, end, overhead
        self.workers = [start(gpu) for gpu in range(gpus)]

    def run(self, jobs: list[Job]) -> Iterator[dict]:
        """Rows in the order in which they end. A job for which there is no time has none."""
        waiting = list(jobs)
        try:
            while True:
                for worker in self.workers:
                    self._assign(worker, waiting)
                busy = [worker for worker in self.workers if not worker.idle]
                starts = any(not worker.ready for worker in busy)
                if not any(worker.job for worker in busy) and not (starts and waiting):
                    return
                left = self.end - time.monotonic()
                timeout = None if math.isinf(left) else max(0.0, left)
                ended = wait([worker.connection for worker in busy], timeout)
                if not ended:
                    break
                for worker in list(self.workers):
                    if worker.connection in ended and (row := self._receive(worker)):
                        yield row
            for worker in self.workers:
                if worker.job is not None:
                    yield {**worker.job.to_dict(), "status": "out of time"}
        finally:
            for worker in self.workers:
                worker.stop()

    def _assign(self, worker: Worker, waiting: list[Job]) -> None:
        left = self.end - time.monotonic()
        fitting = [job for job in waiting if job.expected + self.overhead <= left]
        if not worker.idle or not fitting:
            return
        waiting.remove(fitting[0])
        worker.job, worker.since = fitting[0], time.monotonic()
        worker.connection.send(worker.job)

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
            code = worker.process.exitcode
            if job is None and not worker.ready:
                raise RuntimeError(f"a worker could not start (exit code {code}): see its log.")
            self._replace(worker)
            if job is None:
                return None
            return {**job.to_dict(), "status": f"failed: its process ended with {code}"}
        if message.pop("fatal", False):
            worker.stop()
            self._replace(worker)
        if message["status"] == "ok" and job is not None:
            took = time.monotonic() - worker.since - job.expected
            self.overhead = max(5.0, 0.5 * self.overhead + 0.5 * 1.2 * took)
        return message

    def _replace(self, worker: Worker) -> None:
        self.workers[self.workers.index(worker)] = self.start(worker.gpu)


def starter(setup: Setup) -> Callable[[int], Worker]:
    """What makes workers."""

    def start(gpu: int) -> Worker:
        here, there = SPAWN.Pipe()
        with _sees(gpu):  # not a daemon: it has processes of its own
            process = SPAWN.Process(target=serve, args=(there, setup, gpu))
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
