"""Where in its run a job is: the learning rate, what is kept, and whether it finishes dense."""

import math

from benchmarks.quality.job import Job

WARM_UP = 5  # steps
STEPS_OF_A_RAMP = 16  # retentions it takes, so that shapes are few


class Schedule:
    """What changes over a run, by the share of it that is done: of its time, or of its steps."""

    def __init__(self, job: Job):
        self.job = job

    def share(self, step: int, elapsed: float) -> float:
        """In [0, 1]; ``elapsed`` in seconds."""
        done = step / self.job.steps if self.job.steps else elapsed / (self.job.seconds or 1)
        return min(1.0, done)

    def rate(self, step: int, share: float) -> float:
        """Learning rate of a step."""
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return self.job.learning_rate * min(1.0, (step + 1) / WARM_UP) * cosine

    def finishes(self, share: float) -> bool:
        """Whether full rows come now, of which everything is kept."""
        return self.job.finish > 0 and share >= 1 - self.job.finish

    def retention(self, share: float) -> float | None:
        """What a pass keeps; None: as the config says."""
        if self.finishes(share):
            return 1.0
        if self.job.ramp is None:
            return None
        first, last = self.job.ramp
        done = math.floor(STEPS_OF_A_RAMP * share / (1 - self.job.finish)) / STEPS_OF_A_RAMP
        return first + (last - first) * min(1.0, done)

    def in_fp8(self, share: float) -> bool:
        """Whether products may be in FP8."""
        return share < 1 - max(self.job.finish, self.job.bf16)

    def rows(self, share: float) -> tuple[int, int]:
        """Parts that a row is cut into, and rows a step."""
        if self.finishes(share):
            return 1, self.job.finish_batch
        return self.job.cut, self.job.batch

    def over(self, step: int, elapsed: float, last_step: float) -> bool:
        """Whether to stop before ``step``: half of a step like the last (seconds) is too much."""
        if self.job.steps is not None:
            return step >= self.job.steps
        return elapsed + last_step / 2 > self.job.seconds
