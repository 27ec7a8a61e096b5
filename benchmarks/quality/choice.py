"""Whom blocks are chosen for, beside what the policies know, and whether the needed ones are kept.

A job's `asks` puts another function in the place of its policy, and is shown each batch's questions
and gold blocks before its pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks.quality.feed import Batch
from benchmarks.quality.job import Job
from lemo_hf.core.policies import POLICIES, ScoreInputs
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.lemo import LeMo
from lemo_hf.predictors.overlap import overlap_scores


class Choice:
    """Sees the batches of a run.

    Args:
        job: Its `asks` and its policy.
    """

    def __init__(self, job: Job):
        self.job = job
        self.batch: Batch | None = None
        self.reset()

    def reset(self) -> None:
        """Count anew."""
        self._needed: Tensor | int = 0
        self._kept: Tensor | int = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The job's policy is this one meanwhile."""
        if self.job.asks == "policy":
            yield
            return
        score = self._gold if self.job.asks == "gold" else self._overlap
        with mock.patch.dict(POLICIES, {self.job.lemo["policy"]: score}):
            yield

    def _gold(self, inputs: ScoreInputs) -> Tensor:
        """Blocks that answers depend on, then any."""
        assert self.batch is not None
        return self.batch.gold + torch.rand(self.batch.gold.shape, device=self.batch.gold.device)

    def _overlap(self, inputs: ScoreInputs) -> Tensor:
        assert self.batch is not None
        batch = self.batch
        asking = batch.asking if self.job.asks == "question" else batch.labels != IGNORE_INDEX
        return overlap_scores(batch.ids, asking, inputs.sparse_pass.config.block_size)

    def count(self, lemo: LeMo) -> None:
        """Note what the last pass kept of what its batch needed; the host does not wait."""
        assert self.batch is not None
        if self.job.task == "text":  # whose labels need far more than its facts
            return
        kept = next(iter(lemo.passes.tally.kept_blocks.values()))
        self._needed = self._needed + self.batch.gold.sum() + self.batch.lost
        self._kept = self._kept + (self.batch.gold & kept).sum()

    @property
    def recall(self) -> float | None:
        """Share of the needed blocks that were kept, and of what was cut off none."""
        needed = int(self._needed)
        return round(int(self._kept) / needed, 4) if needed else None
