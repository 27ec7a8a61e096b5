"""One job's training: by the clock or by steps, timed from the first step on warm kernels."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.quality.choice import Choice
from benchmarks.quality.feed import Batch, Feed
from benchmarks.quality.job import Job
from benchmarks.quality.model import precision, reset_adapter, s2_attention
from benchmarks.quality.row import Row, RowSet
from benchmarks.quality.schedule import Schedule
from lemo_hf import LeMoConfig, apply_lemo, remove_lemo

WARM_STEPS = 3  # of each shape, untimed
WARM_SEED = 10**6  # of their rows
CLIP = 1.0  # largest norm of the gradient, as Trainer's default
GIB = 2**30


class _Run:
    """A model in training."""

    def __init__(self, job: Job, model: PeftModel, feed: Feed, device: torch.device):
        self.job, self.model, self.feed, self.device = job, model, feed, device
        self.schedule, self.choice = Schedule(job), Choice(job)
        config = LeMoConfig(**{"seed": job.seed, **job.lemo})
        self.block_size = config.block_size
        self.lemo = apply_lemo(model, config)
        self.at_start = self.held(most=False)  # before graphs take their memory
        self.start(WARM_SEED)

    def start(self, seed: int) -> None:
        """Anew: adapter, optimizer, rows, and what was counted."""
        reset_adapter(self.model, self.job.seed)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.weights, weight_decay=0.0, fused=fused)
        self.source = self.feed.rows(RowSet(self.job.task, self.job.tokens, "train", seed))
        self.parts: list[Row] = []
        self.rows_seen, self.labels = 0, 0
        self.choice.reset()
        self.lemo.passes.tally.reset()

    def _batch(self, share: float) -> Batch:
        """The next rows, as this part of the run has them."""
        cut, count = self.schedule.rows(share)
        size = self.job.tokens // cut
        self.parts = [row for row in self.parts if len(row.ids) == size]
        while len(self.parts) < count:
            self.parts += next(self.source).cut(cut)
            self.rows_seen += 1
        taken, self.parts = self.parts[:count], self.parts[count:]
        return Batch.of(taken, self.block_size, self.device)

    def step(self, number: int, share: float) -> Tensor:
        """One optimizer step; its loss."""
        batch = self._batch(share)
        self.choice.batch, self.labels = batch, self.labels + batch.num_labels
        self.lemo.passes.global_step = number
        self.lemo.set_finish(self.schedule.retention(share))
        self.lemo.set_fp8(self.schedule.in_fp8(share))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(number, share)
        with precision(self.device):
            loss = self.model(input_ids=batch.ids, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.schedule.finishes(share):
            self.choice.count(self.lemo)
        return loss.detach()

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def held(self, most: bool) -> float:
        """GiB allocated, now or at most; the most starts anew. 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        found = torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found / GIB


def train(job: Job, model: PeftModel, feed: Feed, device: torch.device) -> dict:
    """Train the adapter in place, from its start; what it took."""
    model.train()
    run = _Run(job, model, feed, device)
    with ExitStack() as whole:
        whole.callback(remove_lemo, model)
        whole.enter_context(run.choice.installed())
        with ExitStack() as attention:
            if job.attention == "s2":
                attention.enter_context(s2_attention(model))
            run.held(most=True)  # from here on
            for step in range(WARM_STEPS):
                run.step(step, 0.0)
            warm = run.held(most=True)  # a CUDA graph's memory is counted when it is recorded
            if run.schedule.finishes(1.0):
                for step in range(WARM_STEPS):
                    run.step(step, 1.0)
            run.start(job.seed)
            return _timed(run, attention, warm)


def _timed(run: _Run, attention: ExitStack, warm: float) -> dict:
    """The run itself; ``attention`` is closed when it finishes on full rows.

    ``warm`` is the most GiB that steps before the finish took while they were warmed up.
    """
    job, schedule = run.job, run.schedule
    next(run.source)  # rows are made ahead of the clock; this one is not trained on
    run.held(most=True)  # from here on
    losses: list[Tensor] = []
    times: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, float] = {}
    step, finishing = 0, False
    run.wait()
    begin = now = time.perf_counter()
    while not schedule.over(step, now - begin, _last(times)):
        share = schedule.share(step, now - begin)
        if schedule.finishes(share) and not finishing:
            finishing = True
            attention.close()
            peaks[False] = max(warm, run.held(most=True))
        losses.append(run.step(step, share))
        run.wait()
        before, now = now, time.perf_counter()
        times[finishing].append(now - before)
        step += 1
    peaks[finishing] = run.held(most=True)
    if not finishing:
        peaks[False] = max(warm, peaks[False])
    kept = run.lemo.report()
    found = torch.stack(losses).float().cpu() if losses else torch.zeros(0)
    main = peaks.get(False, 0.0)
    return {
        "train_seconds": round(now - begin, 2),
        "steps": step,
        "finish_steps": len(times[True]),
        "rows_seen": run.rows_seen,
        "labels": run.labels,
        "kept": round(kept.get("attention_retention", 1.0), 4),
        "recall": run.choice.recall,
        "step_ms": _median(times[False]),
        "finish_step_ms": _median(times[True]),
        "peak_gib": round(max(peaks.values()), 2),
        "gib_a_row": round((main - run.at_start) / job.batch, 2),
        "losses": [round(x, 3) for x in _means(found)],
    }


def _last(times: dict[bool, list[float]]) -> float:
    """Seconds of the last step, of the finish if it has begun."""
    found = times[True] or times[False]
    return found[-1] if found else 0.0


def _median(seconds: Sequence[float]) -> float | None:
    """In ms."""
    return round(1e3 * statistics.median(seconds), 1) if seconds else None


def _means(losses: Tensor) -> list[float]:
    """Mean loss of each tenth of the run."""
    return [float(part.mean()) for part in losses.tensor_split(10) if len(part)]
