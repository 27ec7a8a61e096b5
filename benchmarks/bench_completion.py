"""Whole optimizer steps of completion rows: labels on the last tokens only, context before them.

Hugging Face with checkpointing (and Liger, where it is installed) take turns with LeMo, which keeps
the blocks with labels and the best of the context by each policy. Beside each policy stands what
choosing takes by itself, on the device and on the host.
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from model_shapes import LORA
from providers import Provider, provider_on, rivals
from record import command_line, environment, matmul_tflops, measure, save, summary
from steps import Bench, empty_memory, train_step, why

from lemo_hf import LeMoConfig
from lemo_hf.config import POLICIES
from lemo_hf.core.policies import POLICIES as SCORES
from lemo_hf.core.policies import ScoreInputs

RESULTS = Path(__file__).parent / "results"
ANSWERS = 512  # labelled tokens a row
RETENTIONS = (0.3, 0.1, 0.05)
VARIANTS: dict[str, dict] = {
    "": {},
    " +mlp": {"recompute": "mlp"},
    " +graph": {"cuda_graphs": True},
    " +mlp+graph": {"recompute": "mlp", "cuda_graphs": True},
    " +fp8": {"fp8": True},
    " +fp8+graph": {"fp8": True, "cuda_graphs": True},
}
CHOOSING = tuple(name for name in POLICIES if name != "predictor")


def providers(retentions: tuple[float, ...], policies: tuple[str, ...]) -> list[Provider]:
    """The rivals, the default at each retention, and the other policies at the first."""
    kinds = ["hf", "liger"] if find_spec("liger_kernel") else ["hf"]
    others = [rival for kind in kinds for rival in rivals(kind) if rival.checkpointing]
    keep = [
        Provider(f"lemo {share:g}{graph}", "lemo", lemo={"retention": share, **options})
        for graph, options in VARIANTS.items()
        for share in retentions
    ]
    choosing = [
        Provider(
            f"lemo {retentions[0]:g} {name}",
            "lemo",
            lemo={"retention": retentions[0], "policy": name},
        )
        for name in policies
    ]
    return others + keep + choosing


def step_samples(
    bench: Bench, provider: Provider, tokens: int, rounds: int, rows: int = 1
) -> list[dict] | str:
    """Timed steps after one that is not, or what went wrong."""
    empty_memory(bench.optimizer)
    try:
        with provider_on(bench.models, provider, {}) as (model, _):
            step = partial(train_step, model, bench.optimizer, tokens, ANSWERS, rows)
            step()
            # The first step under CUDA graphs records them; it also allocates what replays take.
            peaks = {}
            if provider.lemo.get("cuda_graphs"):
                first = measure(step, bench.device)
                peaks = {name: first[name] for name in ("peak_gib", "reserved_gib")}
            return [measure(step, bench.device) | peaks for _ in range(rounds)]
    except Exception as error:  # one provider's failure must not cost the others' numbers
        return why(error)
    finally:
        empty_memory(bench.optimizer)


def choosing(
    bench: Bench, provider: Provider, tokens: int, rows: int, rounds: int = 10
) -> dict[str, float]:
    """Milliseconds of the choice alone: of the device, and of the host until it may go on."""
    spent: list[tuple[float, float]] = []
    name = LeMoConfig(**provider.lemo).policy
    assert name is not None
    scores = SCORES[name]

    def timed(inputs: ScoreInputs) -> torch.Tensor:
        for attempt in range(rounds + 1):
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            began, start = time.perf_counter(), torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            result = scores(inputs)
            end.record()
            host = 1e3 * (time.perf_counter() - began)
            torch.cuda.synchronize()
            if attempt:  # kernels compile
                spent.append((start.elapsed_time(end), host))
        return result

    SCORES[name] = timed
    try:
        with provider_on(bench.models, provider, {}) as (model, _):
            train_step(model, bench.optimizer, tokens, ANSWERS, rows)
    finally:
        SCORES[name] = scores
        empty_memory(bench.optimizer)
    device, host = (statistics.median(column) for column in zip(*spent, strict=True))
    return {"choosing_ms": round(device, 3), "choosing_host_ms": round(host, 3)}


def run(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure all providers at each length; the file is written anew after each."""
    torch.manual_seed(0)
    header = {
        **environment(device),
        "commit": args.commit,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or "default",
        "lora": LORA,
        "labels": ANSWERS,
        "matmul_tflops": matmul_tflops(device),
        "commands": [args.command],
    }
    slug = header["gpu"].lower().replace(" ", "-")
    path = args.output or RESULTS / slug / "bench_completion.json"
    bench = Bench(args.model, max(args.tokens), device, args.tiny)
    rows: list[dict] = []
    for tokens in args.tokens:
        for provider in providers(RETENTIONS, CHOOSING):
            if args.providers and provider.name not in args.providers:
                continue
            samples = step_samples(bench, provider, tokens, args.rounds, args.rows)
            row = {"model": args.model, "tokens": tokens, "provider": provider.name}
            row["rows"] = args.rows
            row["status"] = samples if isinstance(samples, str) else "ok"
            if not isinstance(samples, str):
                row |= summary(samples, args.rows * tokens)
                if provider.kind == "lemo" and "+" not in provider.name and device.type == "cuda":
                    row |= choosing(bench, provider, tokens, args.rows)
            rows.append({**row, "lemo": provider.lemo or None})
            save(path, header, rows)
            shown = {
                k: row.get(k) for k in ("ms_median", "peak_gib", "choosing_ms", "choosing_host_ms")
            }
            print(f"{tokens:7d} {provider.name:22s} {row['status']:8s} {shown}", flush=True)
    return rows


def options(doc: str, script: str) -> argparse.ArgumentParser:
    """What steps of completion rows may be asked; ``script`` is the name of who takes them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="Llama-3 8B", help="of benchmarks/model_shapes.py")
    add("--rows", type=int, default=1, help="a step")
    add("--rounds", type=int, default=5)
    add("--providers", nargs="+", metavar="NAME", help="those alone, such as 'lemo 0.1'")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--output", type=Path, help=f"default: benchmarks/results/GPU/{script}.json")
    add("--tiny", action="store_true", help="tiny models on the CPU: does the script run?")
    return parser


def parsed(parser: argparse.ArgumentParser, script: str) -> tuple[argparse.Namespace, torch.device]:
    """The arguments, with the command itself, and the device to measure on."""
    args = parser.parse_args()
    args.command = command_line(f"{script}.py", sys.argv[1:])
    if not (args.tiny or torch.cuda.is_available()):
        raise SystemExit(f"{script}.py measures on a CUDA GPU, and there is none.")
    return args, torch.device("cpu" if args.tiny else "cuda")


def main() -> None:
    parser = options(__doc__, "bench_completion")
    parser.add_argument("--tokens", nargs="+", type=int, default=[32768])
    run(*parsed(parser, "bench_completion"))


if __name__ == "__main__":
    main()
