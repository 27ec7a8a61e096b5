"""One job: an adapter trained from its start, and what the model then answers, dense."""

import gc
import time

import torch
from peft import PeftModel

from benchmarks.quality.evaluate import Judge
from benchmarks.quality.feed import Feed
from benchmarks.quality.job import Job
from benchmarks.quality.model import load_model, reset_adapter
from benchmarks.quality.train import train
from benchmarks.quality.workers import Setup

FEWER_FROM = 65536  # tokens from which on an evaluation has half of the rows


class Experiments:
    """Runs jobs in one process; models and what is asked are made once for each row length.

    Args:
        setup: Of the worker.
        feed: Makes rows.
        device: Where models run.
    """

    def __init__(self, setup: Setup, feed: Feed, device: torch.device):
        self.setup, self.feed, self.device = setup, feed, device
        self._models: dict[int, PeftModel] = {}
        self._judges: dict[int, Judge] = {}

    def clear(self) -> None:
        """After an error: models are loaded anew."""
        self._models.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _model(self, tokens: int) -> PeftModel:
        if tokens not in self._models:
            self._models[tokens] = load_model(self.setup.base, tokens, self.device)
        return self._models[tokens]

    def _judge(self, tokens: int) -> Judge:
        if tokens not in self._judges:
            half = 1 if tokens < FEWER_FROM else 2
            rows, windows = self.setup.rows // half, self.setup.windows // half
            self._judges[tokens] = Judge(self.feed, tokens, rows, windows, self.device)
        return self._judges[tokens]

    def run(self, job: Job) -> dict:
        """The job's fields and its results."""
        begin = time.perf_counter()
        model = self._model(job.tokens)
        reset_adapter(model, job.seed)
        took = {} if job.seconds == 0 else train(job, model, self.feed, self.device)
        trained = time.perf_counter()
        found = self._judge(job.tokens)(model, job.task)
        end = time.perf_counter()
        return {
            **job.to_dict(),
            "status": "ok",
            **took,
            "evaluate_seconds": round(end - trained, 2),
            "overhead_seconds": round(end - begin - took.get("train_seconds", 0.0), 2),
            **found,
        }
