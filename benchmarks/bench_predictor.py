"""What scores cost that read the model, at one layer of the sizes of Llama-3 8B.

For rows that ask at their end (8 blocks with labels) and rows that are labelled throughout, through
the policies that training uses.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from record import command_line, environment, save
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import (
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from lemo_hf import LeMoConfig
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.policies import POLICIES, ScoreInputs
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.predictors.block_predictor import BlockPredictor

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attn_implementation": "sdpa",
}
NAMES = ("overlap", "predictor", "pooled", "oracle")
LABELS = {"512 labels": 512, "all labels": None}
CALLS = 10  # in a row, of a cost


def timed(call: Callable[[], Tensor]) -> dict[str, float]:
    """What one call costs, after it was called before.

    Returns:
        ``ms_median``, ``ms_min`` and ``ms_max`` of calls that find the GPU idle and wait for it, by
        CUDA events; ``ms_queued``, of each of `CALLS` calls that do not wait; ``ms_kernels``, the
        GPU's own time by the profiler, and ``kernels``, how many it ran (None without a profiler).
    """

    def elapsed(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    elapsed(5)
    single = [elapsed(1) for _ in range(CALLS)]
    queued = statistics.median(elapsed(CALLS) for _ in range(5))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        elapsed(CALLS)
    kernels = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in kernels) / CALLS / 1e3
    for name in sorted({e.name for e in kernels}):
        times = [e.time_range.elapsed_us() for e in kernels if e.name == name]
        print(f"    {len(times) / CALLS:.0f} x {statistics.median(times):.1f} us  {name[:90]}")
    return {
        "ms_median": round(statistics.median(single), 4),
        "ms_min": round(min(single), 4),
        "ms_max": round(max(single), 4),
        "ms_queued": round(queued, 4),
        "ms_kernels": round(busy, 4) if kernels else None,
        "kernels": round(len(kernels) / CALLS) if kernels else None,
    }


@torch.no_grad()
def cost(tokens: int, device: torch.device) -> list[dict]:
    """Time of one layer's scores, a row for each policy and kind of labels."""
    on = {"device": device, "dtype": torch.bfloat16}
    config = LlamaConfig(**LLAMA)
    layer = LlamaDecoderLayer(config, 0).to(**on).eval()
    x = torch.randn(1, tokens, config.hidden_size, **on)
    places = torch.arange(tokens, device=device)[None]
    positions = LlamaRotaryEmbedding(config).to(device)(x, places)
    network = BlockPredictor(config.hidden_size, 64)
    network.init_weights(torch.Generator().manual_seed(0))
    network.to(device)
    ids = torch.randint(0, 128_000, (1, tokens), device=device)
    rows = []
    for name, labels in LABELS.items():
        targets = ids if labels is None else ids.masked_fill(places < tokens - labels, -100)
        for policy in NAMES:
            if policy == "overlap" and labels is None:
                continue  # nobody asks
            lemo = LeMoConfig(policy=policy)
            sparse_pass = SparsePass(lemo, (1, tokens), device, input_ids=ids, targets=targets)
            inputs = ScoreInputs(
                layer, FAMILIES["llama"], 0, "attention", x, positions, sparse_pass, network
            )
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            times = timed(lambda inputs=inputs, policy=policy: POLICIES[policy](inputs))
            extra = (torch.cuda.max_memory_allocated() - before) // 2**20
            row = {"tokens": tokens, "labels": name, "policy": policy, "extra_mib": extra}
            rows.append({**row, **times})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    device = torch.device("cuda")
    header = {
        "commit": args.commit,
        **environment(device, ("torch", "triton", "transformers")),
        "command": command_line("bench_predictor.py", sys.argv[1:]),
    }
    save(args.output, header, [row for tokens in args.tokens for row in cost(tokens, device)])


if __name__ == "__main__":
    main()
