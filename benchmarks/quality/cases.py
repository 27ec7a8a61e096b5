"""What the quality benchmark runs: groups of jobs around one recipe.

A recipe (`recipe.json`, or another file by `--recipe`) has the fields of every job (``job``), what
differs for completion-only fine-tuning (``completion``), and the settings that are measured with
three seeds (``headline``: LeMo options by name). Groups share jobs of one name, which run once.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.job import Job

RECIPE = Path(__file__).parent / "recipe.json"
SEEDS = (0, 1, 2)
TIMING_STEPS = 14
DENSE = "dense"


def read_recipe(path: Path = RECIPE) -> dict[str, Any]:
    """The recipe in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


class Cases:
    """Jobs of one recipe.

    Args:
        recipe: As `read_recipe` gives it.
        predictor: Directory of a trained predictor, or None: its jobs are left out.
        layers: Of the base model.
    """

    def __init__(self, recipe: dict[str, Any], predictor: str | None, layers: int):
        self.recipe, self.predictor, self.layers = recipe, predictor, layers

    def job(self, setting: str, lemo: dict[str, Any] | None = None, **changes: Any) -> Job:
        """The recipe's job with ``changes``."""
        fields = {**self.recipe["job"], "name": setting, "setting": setting, "lemo": lemo}
        return Job(**{**fields, **changes})

    def lemo(self, policy: str, retention: float = 0.5, note: str = "", **options: Any) -> Job:
        """LeMo; ``note`` is the part of the name that says what is special."""
        kind, changes = options.pop("kind", "plain"), options.pop("changes", {})
        chosen = {"policy": policy, "retention": retention, **options}
        if policy == "predictor":
            chosen["predictor"] = self.predictor
            del chosen["policy"]
        name = f"{policy}{', ' if note else ''}{note} {_mean(retention):g}"
        return self.job(changes.pop("prefix", "") + name, chosen, kind=kind, **changes)

    def policies(self, retention: float = 0.5, **options: Any) -> list[Job]:
        """One job a policy, and the oracle and pooled scores by the number of their viewers."""
        learned = ["predictor"] if self.predictor else []
        plain = ["oracle", "pooled", *learned, "random", "recent", "window"]
        return [self.lemo(policy, retention, **options) for policy in plain] + [
            self.lemo(policy, retention, "normalised", normalize_scores=True, **options)
            for policy in ("oracle", "pooled")
        ]

    def groups(self) -> dict[str, list[Job]]:
        """All groups by name, in the order in which they are worth running."""
        dense, lemo, quarter = self.job(DENSE), self.lemo, self.layers // 4
        half = self.layers // 2
        groups = {
            "base": [self.job("base", steps=0)],
            "recipe": self._recipes(),
            "policy": [dense, *self.policies()],
            "retention": [
                dense,
                *(
                    lemo(policy, share)
                    for policy in ("recent", "window", "random", "pooled")
                    for share in (0.7, 0.5, 0.3, 0.15)
                ),
            ],
            "block": [dense]
            + [lemo(policy) for policy in ("random", "pooled", "oracle")]
            + [
                lemo(policy, note=f"blocks of {size}", block_size=size)
                for size in (512, 256, 1024)
                for policy in ("random", "pooled", "oracle")
            ],
            "sets": [
                dense,
                *(
                    job
                    for policy in ("pooled", "oracle", "random")
                    for job in (
                        lemo(policy),
                        lemo(policy, note="each layer its own", agree_across_layers=False),
                        lemo(
                            policy,
                            tuple(self._falling()),
                            "nested",
                            agree_across_layers=False,
                            kind="nested",
                        ),
                    )
                ),
            ],
            "dense_layers": [dense]
            + [
                job
                for policy in ("recent", "window", "pooled")
                for job in (
                    lemo(policy),
                    *(
                        lemo(policy, note=f"first {n} layers dense", dense_first_layers=n)
                        for n in (quarter, half)
                    ),
                )
            ],
            "mlp": [
                dense,
                *(
                    job
                    for policy in ("recent", "pooled")
                    for job in (
                        lemo(policy),
                        lemo(policy, note="MLP dense", mlp_retention=1.0),
                    )
                ),
            ],
            "supervise": [
                dense,
                *(
                    job
                    for policy in ("recent", "random", "pooled")
                    for job in (
                        lemo(policy),
                        lemo(policy, note="all labels", supervise="all"),
                    )
                ),
            ],
            "paper": [dense, self._paper("kept"), self._paper("all")],
            "controls": [dense, *self._controls()],
            "completion": self._completion(),
            "headline": self._headline(),
            "timing": self._timing(),
            "equal_time": self._equal_time(),
        }
        return groups

    def _falling(self) -> list[float]:
        """A retention a layer, from 0.9 down to 0.1; mean 0.5."""
        return [round(0.9 - 0.8 * i / (self.layers - 1), 4) for i in range(self.layers)]

    def _recipes(self) -> list[Job]:
        """Dense recipes, of which one is to answer 90 % of the questions at the full length."""
        jobs = []
        for data in ("many-lines", "many-lines-4-digits", "few-lines"):
            for adapter, rate in (("all-linear", 1e-3), ("all-linear", 2e-3), (None, 1e-3)):
                for steps in (240, 480):
                    if data != "many-lines" and (rate != 1e-3 or steps != 240):
                        continue
                    jobs.append(self._recipe(data, adapter, rate, steps))
        jobs.append(self._recipe("many-lines", None, 3e-4, 240))
        jobs.append(self._recipe("many-lines", "all-linear", 2e-3, 240, rank=64))
        jobs.append(self._recipe("many-answers", "all-linear", 1e-3, 240))
        jobs.append(self._recipe("many-answers", None, 1e-3, 240))
        jobs.append(self._recipe("answers", None, 1e-3, 240))
        return jobs

    def _recipe(
        self, data: str, adapter: str | None, rate: float, steps: int, rank: int = 16
    ) -> Job:
        how = f"LoRA {rank}" if adapter else "full"
        return self.job(
            f"recipe {data}, {how}, {rate:g}, {steps} steps",
            data=data,
            adapter=adapter,
            learning_rate=rate,
            steps=steps,
            rank=rank,
        )

    def _paper(self, supervise: str) -> Job:
        """Attention alone, upper half of the layers, 40 % kept, each layer its own."""
        return self.lemo(
            "oracle",
            0.4,
            f"the paper's setting, loss on {supervise}",
            mlp_retention=1.0,
            dense_first_layers=self.layers // 2,
            agree_across_layers=False,
            supervise=supervise,
        )

    def _random_ltd(self) -> Job:
        """Random-LTD at a constant rate: tokens, a set each layer, first and last layer dense."""
        return self.job(
            "random-LTD 0.5",
            {
                "policy": "random",
                "retention": 0.5,
                "block_size": 1,
                "agree_across_layers": False,
                "dense_first_layers": 1,
                "dense_last_layers": 1,
                "supervise": "all",
            },
        )

    def _controls(self) -> list[Job]:
        batch = self.recipe["job"]["batch"]
        short = [
            self.job(
                f"dense, rows 1/{part}, {'the same' if factor == part else 'half the'} tokens",
                data=f"many-lines-{name}",
                batch=batch * factor,
            )
            for part, name in ((2, "half"), (4, "quarter"))
            for factor in (part, part // 2)
        ]
        subset = [
            self.lemo(policy, share, "gradients only", kind="subset-gradient")
            for policy, share in (("random", 0.5), ("window", 0.5), ("random", 0.25))
        ]
        others = [self.job("S²-Attn", kind="s2attn"), self._random_ltd(), self._half_of_rows()]
        return [*others, *short, *subset]

    def _half_of_rows(self) -> Job:
        """As many labels a step as a sparse setting that keeps a half and asks what it keeps."""
        return self.job("dense, half of the rows", batch=self.recipe["job"]["batch"] // 2)

    def _completion(self) -> list[Job]:
        changes = self.recipe["completion"]
        prefix = "completion, "
        jobs = [self.job(prefix + DENSE, **changes)]
        for share in (0.5, 0.3):
            learned = ["predictor"] if self.predictor else []
            for policy in ("pooled", "oracle", *learned, "random", "recent", "window"):
                jobs.append(self.lemo(policy, share, changes={"prefix": prefix, **changes}))
        return jobs

    def _settings(self) -> dict[str, Job]:
        """Dense and the recipe's headline settings."""
        chosen = self.recipe["headline"].items()
        return {DENSE: self.job(DENSE)} | {
            name: self.job(name, {"retention": 0.5, **options}) for name, options in chosen
        }

    def _headline(self) -> list[Job]:
        """Three seeds; seed 0 has the name that the same job has in other groups."""
        return [
            replace(job, seed=seed, name=f"{name}, seed {seed}" if seed else name)
            for seed in SEEDS
            for name, job in self._settings().items()
        ]

    def _more_rows(self) -> list[Job]:
        """Headline settings with twice the rows a step, for which their memory leaves room."""
        return [
            replace(job, name=name, setting=name, batch=2 * job.batch)
            for job in self._settings().values()
            if job.setting != DENSE
            for name in [f"{job.setting}, {2 * job.batch} rows a step"]
        ]

    def _timing(self) -> list[Job]:
        """Step time and memory of each setting, alone on the GPU."""
        settings = [*self._settings().values(), *self._more_rows()]
        settings.append(self.job("LeMo, all kept", {"retention": 1.0}))
        settings += [self.lemo("recent", share) for share in (0.7, 0.5, 0.3, 0.15)]
        settings += [self.lemo(policy) for policy in ("oracle", "pooled", "random")]
        settings += [self.lemo("predictor")] if self.predictor else []
        settings += [job for job in self._controls() if job.kind != "subset-gradient"]
        settings += [self._paper("kept")]
        short = {"steps": TIMING_STEPS, "evaluate": False, "exclusive": True}
        timed = [replace(job, name=f"time, {job.setting}", **short) for job in settings]
        return list({job.name: job for job in timed}.values())

    def _equal_time(self) -> list[Job]:
        """Every headline setting, and dense with fewer rows, for as long as dense takes."""
        settings = [job for job in self._settings().values() if job.setting != DENSE]
        settings.append(self._half_of_rows())
        return [
            replace(
                job,
                name=f"equal time, {job.setting}{f', seed {seed}' if seed else ''}",
                seed=seed,
                same_time=(f"time, {DENSE}", f"time, {job.setting}"),
            )
            for seed in SEEDS
            for job in [*settings, *self._more_rows()]
        ]


def _mean(retention: float | tuple[float, ...]) -> float:
    if not isinstance(retention, tuple):
        return retention
    return round(sum(retention) / len(retention), 2)


def chosen_jobs(groups: dict[str, list[Job]], names: list[str]) -> list[Job]:
    """Jobs of the groups ``names``, each once; those that need a GPU for themselves first.

    Raises:
        ValueError: Two jobs of one name differ.
    """
    jobs: dict[str, Job] = {}
    for group in names:
        for job in groups[group]:
            if jobs.setdefault(job.name, job) != job:
                raise ValueError(f"two different jobs are named {job.name!r}.")
    return sorted(jobs.values(), key=lambda job: (not job.exclusive, job.same_time is not None))


def tiny(job: Job) -> Job:
    """The job with a few steps of a row or two, to see that it runs."""
    return replace(job, steps=min(job.steps, 3), batch=min(job.batch, 2))
