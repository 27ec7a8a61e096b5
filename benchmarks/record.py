"""Measure one step, and keep the numbers of a run in one JSON file: a header, one row a line."""

import datetime
import importlib
import json
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30


def measure(step: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    """One call of ``step``, which returns a loss.

    Returns:
        ``ms`` by CUDA events, the peaks ``peak_gib`` allocated and ``reserved_gib``, the ``loss``.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        loss = float(step())
        ms = 1e3 * (time.perf_counter() - start)
        return {"ms": ms, "peak_gib": 0.0, "reserved_gib": 0.0, "loss": loss}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    loss = step()
    end.record()
    torch.cuda.synchronize()
    return {
        "ms": start.elapsed_time(end),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "loss": float(loss),
    }


def matmul_tflops(device: torch.device, size: int = 8192, count: int = 20) -> float:
    """What a bf16 matrix product of random numbers reaches: the median of ``count``."""
    if device.type != "cuda":
        size, count = 512, 3
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    times = [measure(lambda: (left @ right)[0, 0], device)["ms"] for _ in range(count)]
    return round(2e-9 * size**3 / statistics.median(times), 3)


def summary(samples: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """Median, least and most ms, the highest peaks in GiB, tokens/s, and the last loss."""
    times = [sample["ms"] for sample in samples]
    return {
        "ms_median": round(statistics.median(times), 1),
        "ms_min": round(min(times), 1),
        "ms_max": round(max(times), 1),
        "rounds": len(times),
        "peak_gib": round(max(sample["peak_gib"] for sample in samples), 2),
        "reserved_gib": round(max(sample["reserved_gib"] for sample in samples), 2),
        "tokens_per_s": round(1e3 * tokens / statistics.median(times)),
        "loss": round(samples[-1]["loss"], 4),
    }


def environment(
    device: torch.device, packages: tuple[str, ...] = ("torch", "triton", "transformers", "peft")
) -> dict[str, str]:
    """GPU, versions and date."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    versions = {name: str(importlib.import_module(name).__version__) for name in packages}
    return {"gpu": gpu, **versions, "date": datetime.date.today().isoformat()}


def load(path: Path) -> tuple[dict, list[dict]]:
    """Header and rows of a file that `save` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["header"], content["rows"]


def command_line(script: str, argv: list[str]) -> str:
    """What was called, but for ``--output``: where the numbers went is nothing to reproduce."""
    before = ["", *argv]
    shown = [
        a for a, b in zip(argv, before, strict=False) if "--output" not in (a.split("=")[0], b)
    ]
    return shlex.join(["python", f"benchmarks/{script}", *shown])


def earlier_rows(path: Path, header: dict, may_differ: tuple[str, ...]) -> list[dict]:
    """Rows of a run that this one continues; its commands go into ``header``."""
    old, rows = load(path)
    differs = [k for k in header if k not in may_differ and old.get(k) != header[k]]
    if differs:
        raise SystemExit(f"--append: {path.name} differs from this run in {', '.join(differs)}.")
    header["commands"] = old["commands"] + header["commands"]
    if header["commit"] not in old["commit"].split(", "):
        header["commit"] = f"{old['commit']}, {header['commit']}"
    else:
        header["commit"] = old["commit"]
    return rows


def save(path: Path, header: dict, rows: list[dict]) -> None:
    """Write header and rows; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{\n"header": {json.dumps(header, indent=2)},\n"rows": [\n{lines}\n]\n}}\n'
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
