"""The constants of `lemo_hf.planning.speed`, fitted to measured steps, and steps held out.

A step is predicted by constants that were fitted without any step of its model and length. Steps
with Liger's kernels are in no fit of the GPU's shares.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from lemo_hf.planning import speed
from lemo_hf.planning.plan import Plan
from lemo_hf.planning.speed import CARDS, FITTED_ON, SHARES, at_peak, host_kinds, step_seconds

SHORT = 8192  # tokens, up to which a step may be the host's


@dataclass(frozen=True)
class Step:
    """One that was measured, and its plan."""

    model: str
    tokens: int
    ms: float
    plan: Plan

    @property
    def group(self) -> tuple[str, int]:
        """Steps that are left out together."""
        return self.model, self.tokens

    @property
    def kind(self) -> str:
        """Of the host's work."""
        return host_kinds(self.plan)[0]

    @property
    def by_the_gpu(self) -> bool:
        """Whether it certainly takes what the GPU takes: not where the host may be slower."""
        if self.plan.fused:
            return False
        slow = self.kind == "recomputed layers"
        return self.plan.work.launches == 1 or self.tokens >= (2 * SHORT if slow else SHORT)


def fitted(steps: Sequence[Step]) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of the peaks, and microseconds of the host by kind, that fit ``steps`` best."""
    kinds = list(SHARES)
    some = [step for step in steps if step.by_the_gpu]
    times = [at_peak(step.plan, CARDS[FITTED_ON]) for step in some]
    each = [
        [1e3 * time.get(kind, 0) / step.ms for kind in kinds]
        for step, time in zip(some, times, strict=True)
    ]
    found = np.linalg.lstsq(np.array(each), np.ones(len(some)), rcond=None)[0]
    shares = {
        kind: round(1 / factor, 3) if factor else SHARES[kind]
        for kind, factor in zip(kinds, found.tolist(), strict=True)
    }
    host = {kind: _host(steps, kind, shares) for kind in speed.HOST}
    return shares, host


def _host(steps: Iterable[Step], kind: str, shares: dict[str, float]) -> float:
    """Microseconds a launch, with which the errors of short steps have the smallest mean."""
    some = [
        step
        for step in steps
        if step.kind == kind and step.tokens <= SHORT and step.plan.work.launches > 1
    ]

    def error(host: float) -> float:
        guesses = [predicted_ms(step, shares, {kind: host}) for step in some]
        return mean(abs(np.log(x / step.ms)) for x, step in zip(guesses, some, strict=True))

    tried = [round(1e3 * step.ms / step.plan.work.launches, 1) for step in some]
    return min(tried, key=error) if tried else speed.HOST[kind]


def predicted_ms(step: Step, shares: dict[str, float], host: dict[str, float]) -> float:
    """Milliseconds by these constants."""
    before = dict(speed.SHARES), dict(speed.HOST)
    try:
        speed.SHARES.update(shares)
        speed.HOST.update(host)
        return 1e3 * step_seconds(step.plan, CARDS[FITTED_ON])
    finally:
        speed.SHARES.update(before[0])
        speed.HOST.update(before[1])


def held_out(steps: Sequence[Step]) -> list[float]:
    """Milliseconds of each step, by constants that were fitted without its group."""
    made = {}
    for group in {step.group for step in steps}:
        made[group] = fitted([step for step in steps if step.group != group])
    return [predicted_ms(step, *made[step.group]) for step in steps]
