"""The jobs of each group, the most telling first: a run that is cut short loses the last ones.

Batches and learning rates are those that were best for each side (group "tuning").
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from benchmarks.quality.job import Job

SEEDS = (0, 1, 2)
COMPLETION, TEXT = 45.0, 60.0  # seconds of training
STEPS = 150  # of a comparison at equal steps: what dense takes in `TEXT` seconds
FINISH = 0.3
# A finish is a share of the time here, and of the steps in LeMoConfig. A dense step takes as long
# as six sparse ones at 0.3 and 32K, so 0.1 of the steps, the default, is this share of the time.
DEFAULT_FINISH = 0.4
CHUNK = 512  # tokens
PREDICTOR_LAYER = 12  # that chooses; those below it stay dense


def overlap(retention: float = 0.3, **fields: Any) -> dict[str, Any]:
    """Blocks that share rare words with what asks."""
    return {"policy": "overlap", "retention": retention, **fields}


def chunks(retention: float, **fields: Any) -> dict[str, Any]:
    """Random contiguous chunks; all rows keep as many, so that CUDA graphs spare the host."""
    lemo = {"policy": "chunks", "retention": retention, "chunk_size": CHUNK}
    return {**lemo, "cuda_graphs": True, **fields}


def completion(arm: str, task: str = "lexical", **fields: Any) -> Job:
    """A job whose labels are answers at the end of rows; dense unless ``fields`` say otherwise."""
    fields = {"seconds": COMPLETION, **fields} if "steps" not in fields else fields
    return Job(arm, task, **fields)


def text(arm: str, **fields: Any) -> Job:
    """A job whose tokens are all labels; dense unless ``fields`` say otherwise."""
    fields = {"seconds": TEXT, **fields} if "steps" not in fields else fields
    return Job(arm, "text", **fields)


def completion_headline(task: str = "lexical", **fields: Any) -> list[Job]:
    """Dense, LeMo, and what anybody can do without it."""
    return [
        completion("dense", task, **fields),
        completion("overlap 0.3", task, lemo=overlap(), batch=2, **fields),
        completion("rows cut to 1/2", task, cut=2, batch=2, **fields),
    ]


def text_headline(**fields: Any) -> list[Job]:
    """The same for rows that are labelled throughout."""
    return [
        text("dense", **fields),
        text("chunks 0.5, dense finish", lemo=chunks(0.5), finish=FINISH, **fields),
        text("rows cut to 1/2, dense finish", cut=2, batch=2, finish=FINISH, **fields),
    ]


def seeded(jobs: Iterable[Job], seeds: Iterable[int]) -> list[Job]:
    """Each job with each seed, a seed after the other."""
    jobs = list(jobs)
    return [replace(job, seed=seed) for seed in seeds for job in jobs]


def headline() -> list[Job]:
    """What the README shows: tasks beside their controls, three seeds of the main ones."""
    lexical, whole = completion_headline(), text_headline()
    hidden = completion_headline("hidden")
    return [
        *seeded([*whole, *lexical, *hidden[:2]], SEEDS[:1]),
        *selection("hidden")[:1],
        *selection("lexical")[:3],
        *seeded(selection("lexical")[3:4], SEEDS),
        *(equal_steps(seed) for seed in SEEDS[:1]),
        *seeded([*whole, *lexical], SEEDS[1:2]),
        *completion_headline(tokens=65536, seconds=60.0)[:2],
        *text_headline(tokens=65536, seconds=90.0),
        *(completion("dense", seconds=2 * COMPLETION, seed=seed) for seed in SEEDS[:2]),
        *seeded([*whole, *lexical], SEEDS[2:]),
        *(equal_steps(seed) for seed in SEEDS[1:]),
        *controls(),
        *seeded(completion_headline("summary"), SEEDS[:2]),
        *seeded([default()], SEEDS),
        *tuned()[:4],
        *seeded(hidden[:2], SEEDS[1:]),
        *seeded(completion_headline(tokens=65536, seconds=60.0)[:2], SEEDS[1:2]),
        *seeded(text_headline(tokens=65536, seconds=90.0), SEEDS[1:2]),
        *graphed(),
    ]


def controls() -> list[Job]:
    """What else anybody can do."""
    recent = {"policy": "recent", "retention": 0.5}
    return [
        text("rows cut to 1/4, dense finish", cut=4, batch=4, finish=FINISH),
        text("recent 0.5, dense finish", lemo=recent, finish=FINISH),
        text("S²-Attn", attention="s2"),
        completion("rows cut to 1/4", cut=4, batch=4),
        completion("S²-Attn", attention="s2"),
    ]


def graphed() -> list[Job]:
    """Completions whose steps are CUDA graphs, as those of `chunks` are; three seeds each."""
    lexical = {"lemo": overlap(random_share=0.25, cuda_graphs=True)}
    hidden = {"lemo": overlap(cuda_graphs=True)}
    arm = "overlap 0.3, a quarter random, CUDA graphs"
    return [
        *seeded([completion(arm, batch=2, **lexical)], SEEDS[:1]),
        *seeded([completion(f"{arm}, 1 row a step", batch=1, **lexical)], SEEDS[:1]),
        *seeded([completion("overlap 0.3, CUDA graphs", "hidden", batch=2, **hidden)], SEEDS),
        *seeded([completion(arm, batch=2, **lexical)], SEEDS[1:]),
        *seeded([completion("dense", seconds=2 * COMPLETION)], SEEDS[2:]),
        *seeded([completion("dense, rate 0.002", learning_rate=2e-3)], SEEDS[1:]),
        *seeded([text("dense, rate 0.002", learning_rate=2e-3)], SEEDS[1:]),
        *seeded([completion(f"{arm}, 1 row a step", batch=1, **lexical)], SEEDS[1:]),
    ]


def kept(
    retention: float, batch: int, task: str = "lexical", chance: float = 0.25, **fields: Any
) -> Job:
    """Completions by words in common, a share ``chance`` of the blocks random, CUDA graphs."""
    named = {"finish": ", dense finish", "finish_batch": " of as many rows"}
    arm = f"overlap {retention:g}" + (", a quarter random" if chance else "") + ", CUDA graphs"
    arm += "".join(text for name, text in named.items() if name in fields)
    arm += f" {fields['finish']:g}" if fields.get("finish", FINISH) != FINISH else ""
    arm += "" if batch == 2 else f", {batch} rows a step"
    lemo = overlap(retention, **({"random_share": chance} if chance else {}), cuda_graphs=True)
    return completion(arm, task, lemo=lemo, batch=batch, **fields)


def cut(parts: int, task: str = "lexical", **fields: Any) -> Job:
    """Rows cut, as many tokens a step as a whole row has; with ``finish`` on whole rows."""
    arm = f"rows cut to 1/{parts}" + (", dense finish" if "finish" in fields else "")
    return completion(arm, task, cut=parts, batch=parts, **fields)


def low() -> list[Job]:
    """Completions that keep a tenth or a twentieth, beside rows cut to about as much."""
    return [
        *(kept(0.1, batch) for batch in (2, 8, 4)),
        kept(0.05, 8),
        kept(0.3, 2),
        cut(8),
        cut(8, finish=FINISH),
        kept(0.1, 4, finish=FINISH),
        *seeded([kept(0.1, 4), kept(0.05, 8), kept(0.1, 2), kept(0.1, 8), cut(8)], SEEDS[1:]),
        *seeded([completion("dense, rate 0.002", learning_rate=2e-3)], SEEDS[2:]),
        *seeded([kept(0.1, 4, finish=FINISH)], SEEDS[1:]),
        *seeded([kept(0.3, 2, finish=FINISH)], SEEDS),
        kept(0.1, 4, finish=FINISH / 2),
        kept(0.05, 8, finish=FINISH),
    ]


def finished() -> list[Job]:
    """A dense finish behind a tenth, questions without shared words, and the controls of both.

    With ``finish_batch`` a step of the finish has as many rows as before, as in `LeMoConfig`.
    """
    hidden = [
        kept(0.1, 4, "hidden", finish=FINISH),
        completion("dense, rate 0.002", "hidden", learning_rate=2e-3),
        kept(0.3, 2, "hidden", chance=0, finish=FINISH),
    ]
    return [
        *seeded(hidden, SEEDS),
        *seeded([kept(0.1, 4, finish=FINISH, finish_batch=4)], SEEDS),
        *seeded([kept(0.1, 2, tokens=65536, seconds=60.0, finish=FINISH)], SEEDS[:2]),
        *seeded([cut(8, "hidden", finish=FINISH), kept(0.1, 4, "hidden")], SEEDS),
        *seeded([kept(0.1, 4, chance=0, finish=FINISH)], SEEDS),
        *seeded([cut(8, finish=FINISH), cut(2, finish=FINISH)], SEEDS[1:]),
    ]


def in_fp8() -> list[Job]:
    """Products with frozen weights in FP8, beside the same steps and the same time without."""
    whole = replace(equal_steps(0), arm="chunks 0.5, dense finish, FP8", lemo=chunks(0.5, fp8=True))
    lemo = overlap(random_share=0.25, cuda_graphs=True, fp8=True)
    arm = "overlap 0.3, a quarter random, CUDA graphs, FP8"
    by_default = [
        text(f"{name}, a tenth dense", steps=STEPS, about=36, finish=0.1, lemo=chunks(0.3, **fp8))
        for name, fp8 in (("chunks 0.3", {}), ("chunks 0.3 in FP8", {"fp8": True}))
    ]
    ended = replace(by_default[-1], arm=f"{by_default[-1].arm}, three tenths in bf16", bf16=0.3)
    return seeded([whole, completion(arm, batch=2, lemo=lemo), *by_default, ended], SEEDS)


def equal_steps(seed: int) -> Job:
    """As many steps as dense takes in `TEXT` seconds, one row a step, the finish included."""
    lemo = chunks(0.5)
    return text(
        "chunks 0.5, dense finish", steps=STEPS, about=36, lemo=lemo, finish=FINISH, seed=seed
    )


def selection(task: str) -> list[Job]:
    """Who may choose, and how well."""
    two = {"batch": 2}
    return [
        completion("needed blocks by construction 0.3", task, lemo=overlap(), asks="gold", **two),
        completion("overlap of the question 0.3", task, lemo=overlap(), asks="question", **two),
        completion("overlap of the answer 0.3", task, lemo=overlap(), asks="answer", **two),
        completion("overlap 0.3, a quarter random", task, lemo=overlap(random_share=0.25), **two),
        completion("chunks 0.3", task, lemo=chunks(0.3, cuda_graphs=False), **two),
        completion("overlap 0.3, dense finish", task, lemo=overlap(), finish=FINISH, **two),
        completion("rows cut to 1/2, dense finish", task, cut=2, finish=FINISH, **two),
        completion("overlap 0.15", task, lemo=overlap(0.15), **two),
        completion("pooled 0.3", task, lemo={"policy": "pooled", "retention": 0.3}, **two),
        completion("recent 0.5", task, lemo={"policy": "recent", "retention": 0.5}, **two),
    ]


def schedules() -> list[Job]:
    """How a run on full labels ends, and how much it keeps until then."""
    half = {"lemo": chunks(0.5)}
    return [
        text("chunks 0.5", **half),
        text("chunks 0.5, dense finish 0.15", finish=0.15, **half),
        text("chunks 0.3, dense finish", lemo=chunks(0.3), finish=FINISH),
        text("chunks, ramp 0.2 to 1", lemo=chunks(0.5, cuda_graphs=False), ramp=(0.2, 1.0)),
        text("rows cut to 1/2", cut=2, batch=2),
        text("dense, half of the rows", steps=STEPS // 2, about=32),
        text(
            "chunks of 1,024, 0.5, dense finish", lemo=chunks(0.5, chunk_size=1024), finish=FINISH
        ),
    ]


def default(**fields: Any) -> Job:
    """What `LeMoConfig()` does with rows that are labelled throughout."""
    finish = DEFAULT_FINISH
    return text("the default: chunks 0.3, dense finish", lemo=chunks(0.3), finish=finish, **fields)


def more() -> list[Job]:
    """Everything else, in the order of what it is worth."""
    hidden, lexical = selection("hidden"), selection("lexical")
    return [
        *schedules(),
        *lexical[4:],
        *completion_headline(tokens=16384),
        *text_headline(tokens=16384),
        *tuned()[4:9],
        completion("overlap 0.3", seconds=2 * COMPLETION, lemo=overlap(), batch=2),
        *hidden[1:5],
        *seeded(lexical[1:3], SEEDS[1:]),
        *(Job("base", task, seconds=0) for task in ("text", "lexical", "hidden", "summary")),
    ]


def tuned() -> list[Job]:
    """Other learning rates than 1e-3."""
    lexical = selection("lexical")[3]
    jobs = [default(), text("dense"), completion("dense"), lexical, text_headline()[1]]
    return [
        replace(job, arm=f"{job.arm}, rate {rate:g}", learning_rate=rate)
        for rate in (2e-3, 4e-3, 5e-4)
        for job in jobs
    ]


def tuning() -> list[Job]:
    """Learning rates and batches of dense and of LeMo."""
    batches = [
        replace(completion("dense"), batch=2),
        replace(completion("overlap 0.3", lemo=overlap()), batch=1),
        replace(text("dense"), batch=2),
        replace(text_headline()[1], batch=2),
        replace(text_headline()[2], batch=4),
    ]
    rows = [replace(job, arm=f"{job.arm}, {job.batch} rows a step") for job in batches]
    return [*tuned(), *rows]


def with_predictor(path: str) -> list[Job]:
    """A learned predictor in the place of words in common."""
    lemo = {"predictor": path, "retention": 0.3, "dense_first_layers": PREDICTOR_LAYER}
    return [completion("predictor 0.3", task, lemo=lemo, batch=2) for task in ("hidden", "lexical")]


def smoke() -> list[Job]:
    """Every kind of task and of arm, for seconds."""
    jobs = [
        *text_headline(),
        completion_headline()[1],
        selection("hidden")[0],
        selection("lexical")[3],
        completion_headline("summary")[1],
        text("S²-Attn, dense finish", attention="s2", finish=FINISH),
        schedules()[3],
        text_headline(tokens=65536)[1],
    ]
    return [replace(job, seconds=4.0) for job in jobs]


GROUPS = {
    "smoke": smoke,
    "finished": finished,
    "fp8": in_fp8,
    "graphed": graphed,
    "headline": headline,
    "low": low,
    "more": more,
    "tuning": tuning,
}


def jobs_of(
    groups: Iterable[str], predictor: str | None = None, tokens: int | None = None
) -> list[Job]:
    """Jobs of ``groups`` in order, each once; ``tokens``: of a row in all of them."""
    found: dict[str, Job] = {}
    for group in groups:
        learned = with_predictor(predictor) if predictor else []
        for job in [*GROUPS[group](), *learned]:
            job = replace(job, group=group, tokens=tokens or job.tokens)
            found.setdefault(job.name, job)
    return list(found.values())
