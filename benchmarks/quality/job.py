"""One training run of the quality benchmark, as data."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.quality.row import TASKS

ATTENTIONS = ("full", "s2")
ASKS = ("policy", "question", "answer", "gold")
DENSE = {"retention": 1.0, "policy": "recent"}


@dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Attributes:
        arm: Name of the setting; rows that differ in their seed alone share it.
        task: One of `TASKS`.
        tokens: Of a full row.
        seconds: Wall-clock of training; 0 evaluates the base. None where ``steps`` is set.
        steps: Optimizer steps, in place of ``seconds``.
        about: Seconds that ``steps`` will take at most, for the queue.
        batch: Rows a step, as they are after ``cut``.
        learning_rate: The highest; cosine with warm-up.
        lemo: Fields of `LeMoConfig`; the default keeps everything.
        cut: Rows are made 1 / ``cut`` as long.
        finish: Share of the run at its end with full rows of which everything is kept.
        finish_batch: Rows a step there.
        bf16: Share of the run at its end without FP8, the finish included.
        ramp: Retentions at the start and at the end of what is before the finish, or None.
        attention: "full", or "s2": LongLoRA's shifted sparse attention, until the finish.
        asks: Whom blocks are chosen for. "policy": as the policy does. "question", "answer": by
            overlap with the tokens of one of them. "gold": blocks that answers depend on.
        seed: Of the adapter, the rows, and random policies.
        group: Of the job lists.
    """

    arm: str
    task: str
    tokens: int = 32768
    seconds: float | None = None
    steps: int | None = None
    about: float = 0.0
    batch: int = 1
    learning_rate: float = 1e-3
    lemo: dict[str, Any] = field(default_factory=lambda: dict(DENSE))
    cut: int = 1
    finish: float = 0.0
    finish_batch: int = 1
    bf16: float = 0.0
    ramp: tuple[float, float] | None = None
    attention: str = "full"
    asks: str = "policy"
    seed: int = 0
    group: str = ""

    def __post_init__(self):
        for name, choices in (("task", TASKS), ("attention", ATTENTIONS), ("asks", ASKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if (self.seconds is None) == (self.steps is None):
            raise ValueError("a job has either seconds or steps")
        if self.attention == "s2" and self.lemo != DENSE:
            raise ValueError("attention='s2' is for rows that keep everything")

    @property
    def name(self) -> str:
        """Unique in a run."""
        span = f"{self.steps} steps" if self.seconds is None else f"{self.seconds:g} s"
        return f"{self.task} {self.tokens // 1024}K, {self.arm}, {span}, seed {self.seed}"

    @property
    def expected(self) -> float:
        """Seconds of training."""
        return self.about if self.seconds is None else self.seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back: lists for tuples."""
        return json.loads(json.dumps({"name": self.name, **asdict(self)}))
