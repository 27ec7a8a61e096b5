"""What memory holds over one optimizer step: the allocator's record, as a small JSON file.

`plots.py` makes the picture of it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from providers import lemo_config, provider_of, provider_on
from record import GIB, command_line, environment, save
from steps import Bench, empty_memory, train_step
from timeline import ORIGINS, at_the_peak, pieces_of, series_of

RESULTS = Path(__file__).parent / "results"
MODEL = "Llama-3 8B"
ENTRIES = 1_000_000


def record_step(bench: Bench, name: str, tokens: int) -> dict:
    """One row: the series of a step, and what is alive at its peak."""
    provider = provider_of(name)
    config = lemo_config(provider, bench.options)
    with provider_on(bench.models, provider, bench.options) as (model, _):
        train_step(model, bench.optimizer, tokens)
        empty_memory(bench.optimizer)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        torch.cuda.memory._record_memory_history(
            context="alloc", stacks="python", max_entries=ENTRIES
        )
        train_step(model, bench.optimizer, tokens)
        torch.cuda.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(enabled=None)
        peak = torch.cuda.max_memory_allocated()
    stream = tokens * model.config.hidden_size * 2
    pieces, times = pieces_of(trace, stream)
    most, largest = at_the_peak(pieces)
    return {
        "provider": name,
        "tokens": tokens,
        "retention": None if config is None else config.retention,
        "peak_gib": round(peak / GIB, 3),
        "recorded_peak_gib": round((base + most) / GIB, 3),
        "base_gib": round(base / GIB, 3),
        "events": len(times),
        "origins": list(ORIGINS),
        "at_the_peak": largest,
        "series": series_of(pieces, times, base),
        "config": None if config is None else config.to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--providers", nargs="+", default=["lemo+checkpointing"], metavar="NAME")
    add("--tokens", type=int, default=65536)
    add("--lemo", type=json.loads, default={}, help="fields of LeMoConfig for all LeMo providers")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--output", type=Path, help="default: benchmarks/results/GPU/bench_timeline.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_timeline.py measures on a CUDA GPU, and there is none.")
    device = torch.device("cuda")
    torch.manual_seed(0)
    command = command_line("bench_timeline.py", sys.argv[1:])
    header = {**environment(device), "commit": args.commit, "model": MODEL, "commands": [command]}
    slug = header["gpu"].lower().replace(" ", "-")
    path = args.output or RESULTS / slug / "bench_timeline.json"
    bench = Bench(MODEL, args.tokens, device, options=args.lemo)
    rows = []
    for name in args.providers:
        rows.append(record_step(bench, name, args.tokens))
        save(path, header, rows)
        row = rows[-1]
        print(f"{name}: peak {row['peak_gib']} GiB, recorded {row['recorded_peak_gib']} GiB")
        for part in row["at_the_peak"]:
            print(
                f"  {part['gib']:8.3f} GiB {part['count']:5d} x {part['origin']}: {part['where']}"
            )


if __name__ == "__main__":
    main()
