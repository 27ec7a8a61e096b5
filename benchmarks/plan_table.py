"""The table of the memory plan: peaks that `bench_step.py` measured, and predictions.

Predicting them all takes minutes: as a script this writes results/plan.json, and the table is made
of that. `make soak` predicts them again.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from model_shapes import SHAPES, model_config

from lemo_hf import LeMoConfig
from lemo_hf.planning.plan import GIB, Planner

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "plan.json"
MEMORY_GIB = {"NVIDIA H200": 139.7, "NVIDIA H100 80GB HBM3": 79.1}  # of the device
CONTEXT_GIB = 0.5


def measured() -> Iterator[tuple[dict, list[dict]]]:
    """Header and measured rows of every ``bench_step.json``, those that are planned."""
    for file in sorted(RESULTS.glob("*/bench_step.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        yield content["header"], [row for row in content["rows"] if plannable(row)]


def plannable(row: dict) -> bool:
    """Whether a row was measured, and is Hugging Face's or LeMo's as the package itself is."""
    known = row["provider"].startswith(("hf", "lemo")) and not row["provider"].endswith("uniform")
    known &= row["config"] is None or "checkpointing" in row  # not before recompute had levels
    return row["status"] == "ok" and known


def predicted(header: dict, row: dict) -> float:
    """GiB that the plan expects where ``row`` was measured."""
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
    return planner.plan(lemo, row["tokens"], room).peak / GIB


@cache
def _planner(
    title: str, rank: int, adapter_dtype: str, checkpointing: bool, stock_offload: bool
) -> Planner:
    return Planner(
        model_config(title),
        lora_rank=rank,
        lora_targets=SHAPES[title].targets,
        adapter_dtype=adapter_dtype,
        autocast=False,
        gradient_checkpointing=checkpointing,
        stock_offload=stock_offload,
    )


def _as_it_is_now(config: dict) -> LeMoConfig:
    """A recorded config without fields that are gone and changed no memory."""
    return LeMoConfig.from_dict({k: v for k, v in config.items() if k != "normalize_scores"})


def key_of(header: dict, row: dict) -> str:
    """A measured step's name in `RECORD`."""
    return ", ".join(
        str(x) for x in (header["gpu"], row["group"], row["model"], row["tokens"], row["provider"])
    )


def recorded() -> dict[str, float]:
    """GiB that the plan expected, by `key_of`."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def plan_table() -> str:
    """Markdown: a measured configuration a line, and by how much the plan is off at most."""
    parts, record = [], recorded()
    for header, rows in measured():
        titles = ["model", "tokens", "step", "measured GiB", "predicted GiB", "difference"]
        lines = [titles, ["---"] * len(titles)]
        worst = {"LeMo": 0.0, "HF": 0.0}
        for row in rows:
            expected = record[key_of(header, row)]
            off = expected / row["peak_gib"] - 1
            kind = "HF" if row["config"] is None else "LeMo"
            worst[kind] = max(worst[kind], abs(off))
            lines.append(
                [
                    row["model"],
                    f"{row['tokens'] // 1024}K",
                    row["provider"].replace("+", " + "),
                    f"{row['peak_gib']:.2f}",
                    f"{expected:.2f}",
                    f"{off:+.1%}".replace("-0.0%", "+0.0%"),
                ]
            )
        count = sum(row["config"] is not None for row in rows)
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts.append(
            f"Off by at most {worst['LeMo']:.1%} in {count} LeMo configurations and "
            f"{worst['HF']:.1%} in the other {len(rows) - count}. Peaks of {header['gpu']}, torch "
            f"{header['torch']}, from `bench_step.json`; `benchmarks/plan_table.py`."
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    found = {key_of(h, row): round(predicted(h, row), 4) for h, rows in measured() for row in rows}
    RECORD.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
    print(plan_table())
