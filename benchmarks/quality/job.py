"""One training run of the quality benchmark, as data."""

import json
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("plain", "s2attn", "nested", "subset-gradient")
ADAPTERS = ("all-linear", "attention", None)


@dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Attributes:
        name: Unique in a run.
        setting: What rows of several seeds, and of the same setting's timing, have in common.
        data: Name of the training set.
        steps: Optimizer steps; 0 evaluates the base model.
        batch: Rows a step.
        learning_rate: The highest; cosine with warm-up.
        adapter: LoRA on ``"all-linear"`` or ``"attention"`` (q, k, v, o); None trains all weights.
        rank: Of LoRA; alpha is twice as much.
        kind: ``"plain"``: the Trainer, with LeMo if ``lemo`` says so. ``"s2attn"``: LongLoRA's
            attention in training. ``"nested"``: LeMo whose kept sets only shrink from layer to
            layer. ``"subset-gradient"``: exact forward, gradients through what ``lemo`` keeps.
        lemo: Options of `LeMoConfig`; None is dense.
        seed: Of the adapter, the order of rows, and the random policy.
        evaluate: False for a run that only tells step time and memory.
        exclusive: Nothing else runs on the GPU meanwhile.
        same_time: Names of two timing jobs, of another setting and of this one: ``steps`` are the
            other's, and this one takes as many as fit into the same time.
    """

    name: str
    setting: str
    data: str
    steps: int
    batch: int
    learning_rate: float
    adapter: str | None = "all-linear"
    rank: int = 16
    kind: str = "plain"
    lemo: dict[str, Any] | None = None
    seed: int = 0
    evaluate: bool = True
    exclusive: bool = False
    same_time: tuple[str, str] | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}.")
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter must be one of {ADAPTERS}, got {self.adapter!r}.")
        if self.kind in ("nested", "subset-gradient") and self.lemo is None:
            raise ValueError(f"kind={self.kind!r} needs lemo options, which say what is kept.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back: lists for tuples."""
        return json.loads(json.dumps(asdict(self)))

    def same_run(self, row: dict[str, Any]) -> bool:
        """Whether ``row`` is a result of this job; steps of `same_time` were found at run time."""
        mine = self.to_dict()
        return all(
            row.get(key) == value
            for key, value in mine.items()
            if key != "steps" or not self.same_time
        )
