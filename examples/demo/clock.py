"""Equal time for every way of training, whatever else the machine does meanwhile."""

import math
import statistics
import time
from itertools import pairwise

from tqdm import tqdm
from transformers import TrainerCallback

from lemo_hf.schedule import is_late

OPEN = 10_000  # steps, as many as no run takes
WARM_UP = 3  # steps until the learning rate is whole
RECENT = 5  # steps whose median tells how long the next ones take


class Clock(TrainerCallback):
    """Ends a run after ``seconds``, and tells Trainer after each step how many steps that makes.

    Args:
        seconds: Of training.
        finish: Share of the steps, at the end, that are dense.
        dense_step: Seconds of such a step.
    """

    def __init__(self, seconds: float, finish: float = 0.0, dense_step: float = 0.0):
        self.seconds, self.finish, self.dense_step = seconds, finish, dense_step
        self.ends: list[float] = []  # of steps, in seconds since the first one began
        self.began: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds of training."""
        return 0.0 if self.began is None else time.perf_counter() - self.began

    @property
    def step_seconds(self) -> float:
        """Of a recent step."""
        recent = [0.0, *self.ends][-RECENT - 1 :]
        return statistics.median(end - before for before, end in pairwise(recent))

    def rate(self, step: int) -> float:
        """The learning rate by its highest: a cosine over the time, behind a few steps less."""
        share = min(1.0, self.elapsed / self.seconds)
        return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))

    def on_train_begin(self, args, state, control, **kwargs):
        """The clock starts."""
        self.began, self.ends, self.finishes = time.perf_counter(), [], False
        self.bar = tqdm(total=self.seconds, bar_format="{percentage:3.0f}% |{bar:30}|{postfix}")

    def on_step_end(self, args, state, control, **kwargs):
        """How many steps will there be?"""
        self.ends.append(self.elapsed)
        done, left, step = state.global_step, self.seconds - self.ends[-1], self.step_seconds
        if self.finishes:  # so this one was dense
            self.dense_step = self.ends[-1] - self.ends[-2]
            more = left / self.dense_step
        else:  # the finish's steps take longer, and are a share of all
            longer = self.finish * (self.dense_step - step)
            more = (left - done * longer) / (step + longer)
        state.max_steps = done + max(0, round(more))
        self.finishes |= is_late(self.finish, done, state.max_steps)
        if self.finishes:  # to its end: any step that is said to be the last one is dense
            state.max_steps = min(state.max_steps, done + 1)
        control.should_training_stop = done == state.max_steps
        loss = f", loss {state.log_history[-1]['loss']:.3f}" if state.log_history else ""
        self.bar.set_postfix_str(f"{self.ends[-1]:.0f} s, {done} steps{loss}", refresh=False)
        self.bar.update(min(self.seconds, self.ends[-1]) - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        """The bar stays as it is."""
        self.bar.close()
