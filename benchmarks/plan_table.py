"""The tables of the plan: peaks and times of `bench_step.py` and `bench_completion.py`, predicted.

Predicting them all takes minutes: as a script this writes results/plan.json, and the table is made
of that. `make soak` predicts them again.
"""

import json
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from model_shapes import SHAPES, model_config
from plan_speed import Step, fitted, held_out

from lemo_hf import LeMoConfig
from lemo_hf.planning.plan import GIB, Plan, Planner
from lemo_hf.planning.speed import CARDS, FITTED_ON, step_seconds

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "plan.json"
MEMORY_GIB = {"NVIDIA H200": 139.7, "NVIDIA H100 80GB HBM3": 79.1}  # of the device
CONTEXT_GIB = 0.5
KINDS = {"hf": "HF", "liger": "Liger", "lemo": "LeMo"}


def measured() -> Iterator[tuple[dict, list[dict]]]:
    """Header and measured rows of every ``bench_step.json``, those that are planned."""
    for file in sorted(RESULTS.glob("*/bench_step.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        yield content["header"], [row for row in content["rows"] if plannable(row)]


def plannable(row: dict) -> bool:
    """Whether a row was measured, and is a rival's that is planned or LeMo's as the package is."""
    known = row["provider"].startswith(tuple(KINDS)) and not row["provider"].endswith("uniform")
    known &= row["config"] is None or "checkpointing" in row  # not before recompute had levels
    known &= row["group"] != "axolotl"  # not planned; LeMo and Liger of that group stand in others
    return row["status"] == "ok" and known


def completions() -> Iterator[tuple[dict, list[dict]]]:
    """Header and rows of every ``bench_completion*.json`` but those of other policies, which keep
    as much."""
    for file in sorted(RESULTS.glob("*/bench_completion*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        known = (r for r in content["rows"] if r["status"] == "ok" and not _axolotls(r))
        yield content["header"], [r for r in known if "policy" not in (r["lemo"] or {})]


def _axolotls(row: dict) -> bool:
    """Whether Axolotl chose what was stored, which is not planned."""
    return row["provider"].endswith("+axolotl")


def planned(header: dict, row: dict) -> Plan:
    """The plan of what was measured as ``row``."""
    if "labels" in header:
        return _planned_completion(header, row)
    config = row["config"]
    checkpointing = row.get("checkpointing", row["provider"].endswith("+checkpointing"))
    # Without autocast, as the benchmark's step runs.
    planner = _planner(
        row["model"],
        header["lora"]["r"],
        header["lora_dtype"],
        checkpointing,
        row.get("transformers_offload", False),
    )
    room = (MEMORY_GIB[header["gpu"]] - CONTEXT_GIB) * GIB
    lemo = None if config is None else _as_it_is_now(config)
    return planner.plan(lemo, row["tokens"], room, fused=row["provider"].startswith("liger"))


def _planned_completion(header: dict, row: dict) -> Plan:
    name = row["provider"]
    how = {"batch_size": row.get("rows", 1), "labels": header["labels"]}
    ways = "+checkpointing" in name, "+offload" in name
    planner = _planner(row["model"], header["lora"]["r"], "bfloat16", *ways, **how)
    lemo = None if row["lemo"] is None else LeMoConfig(**row["lemo"])
    return planner.plan(lemo, row["tokens"], fused=name.startswith("liger"))


@cache
def _planner(
    title: str,
    rank: int,
    adapter_dtype: str,
    checkpointing: bool,
    stock_offload: bool,
    **rows: int,
) -> Planner:
    return Planner(
        model_config(title),
        lora_rank=rank,
        lora_targets=SHAPES[title].targets,
        adapter_dtype=adapter_dtype,
        autocast=False,
        gradient_checkpointing=checkpointing,
        stock_offload=stock_offload,
        **rows,
    )


def _as_it_is_now(config: dict) -> LeMoConfig:
    """A recorded config without fields that are gone and changed no memory."""
    return LeMoConfig.from_dict({k: v for k, v in config.items() if k != "normalize_scores"})


def key_of(header: dict, row: dict) -> str:
    """A measured step's name in `RECORD`."""
    group = f"{header['labels']} labels" if "labels" in header else row["group"]
    parts = header["gpu"], group, row["model"], row["tokens"], row["provider"]
    return ", ".join(str(x) for x in parts)


def recorded() -> dict[str, dict[str, float]]:
    """What the plan expected, by `key_of`: GiB, ms, and ms by constants fitted without the step."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def plan_table() -> str:
    """Markdown: a measured configuration a line, and by how much the plan is off at most."""
    parts, record = [], recorded()
    for header, rows in measured():
        lines, memory, time = compared([(header, row) for row in rows], record, "ms_held_out")
        parts.append(lines)
        parts.append(
            f"Memory is off by at most {memory.worst()}. Time, each by constants that were fitted "
            f"without the steps of that model and length, is off by {time.median()} in the median "
            f"and by at most {time.worst()}. {header['gpu']}, torch {header['torch']}, from "
            "`bench_step.json`; `benchmarks/plan_table.py`."
        )
    several = [(header, row) for header, rows in completions() for row in rows]
    lines, memory, time = compared(several, record, "ms")
    parts += [f"Completion rows, {several[0][0]['labels']} labels each:", lines]
    parts.append(
        f"Memory is off by at most {memory.worst()}. Time, by constants fitted to none of "
        f"these steps, is off by {time.median()} in the median and by at most {time.worst()}. From "
        "`bench_completion*.json`."
    )
    return "\n\n".join(parts)


def compared(
    steps: list[tuple[dict, dict]], record: dict[str, dict[str, float]], by: str
) -> tuple[str, "Counted", "Counted"]:
    """Markdown of measured steps beside the plan, and how far its memory and time are off.

    ``by``: whose prediction of time in `RECORD`.
    """
    titles = ["model", "tokens", "step", "measured GiB", "predicted GiB", "difference"]
    titles += ["measured ms", "predicted ms", "difference"]
    lines = [titles, ["---"] * len(titles)]
    memory, time = Counted(), Counted()
    for header, row in steps:
        expected = record[key_of(header, row)]
        kind = next(KINDS[x] for x in KINDS if row["provider"].startswith(x))
        rows = f"{row['rows']} × " if row.get("rows", 1) > 1 else ""
        lines.append(
            [
                row["model"],
                f"{rows}{row['tokens'] // 1024}K",
                " + ".join(part.strip() for part in row["provider"].split("+")),
                f"{row['peak_gib']:.2f}",
                f"{expected['gib']:.2f}",
                memory.off(kind, expected["gib"] / row["peak_gib"] - 1),
                f"{row['ms_median']:,.0f}",
                f"{expected[by]:,.0f}",
                time.off(kind, expected[by] / row["ms_median"] - 1),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines), memory, time


class Counted:
    """Relative errors, by who takes the steps."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def off(self, kind: str, error: float) -> str:
        """Count an error; how it is written."""
        self._found.setdefault(kind, []).append(abs(error))
        return f"{error:+.1%}".replace("-0.0%", "+0.0%")

    def median(self) -> str:
        return f"{statistics.median(x for errors in self._found.values() for x in errors):.1%}"

    def worst(self) -> str:
        """In words, by kind."""
        said = [
            f"{max(errors):.1%} in {len(errors)} configurations of {kind}"
            for kind, errors in self._found.items()
        ]
        return f"{', '.join(said[:-1])} and {said[-1]}"


def main() -> None:
    """Predict all again, and fit the constants anew."""
    found = [(header, row, planned(header, row)) for header, rows in measured() for row in rows]
    steps = [Step(row["model"], row["tokens"], row["ms_median"], plan) for _, row, plan in found]
    record = {}
    for (header, row, plan), ms in zip(found, held_out(steps), strict=True):
        own = 1e3 * step_seconds(plan, CARDS[FITTED_ON])
        expected = {"gib": plan.peak / GIB, "ms": own, "ms_held_out": ms}
        record[key_of(header, row)] = {name: round(x, 4) for name, x in expected.items()}
    for header, rows in completions():
        for row in rows:
            plan = planned(header, row)
            own = 1e3 * step_seconds(plan, CARDS[FITTED_ON])
            record[key_of(header, row)] = {"gib": round(plan.peak / GIB, 4), "ms": round(own, 4)}
    RECORD.write_text(json.dumps(record, indent=0) + "\n", encoding="utf-8")
    print(plan_table())
    print("For lemo_hf/planning/speed.py:", *fitted(steps))


if __name__ == "__main__":
    main()
