"""Whole steps with each kernel left out in turn: what it is worth where it is used.

Without a kernel the step does what lemo-hf did before it had one: transformers' norm, MLP and
rotary code on kept rows, rows moved by PyTorch's indexing, the loss in PyTorch. Variants take
turns, as the providers of `bench_step.py` do.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from providers import provider_of
from record import command_line, environment, save, summary
from steps import Bench

RESULTS = Path(__file__).parent / "results"
MODEL = "Llama-3 8B"
KERNELS = "lemo_hf.kernels."
NORMS = [("lemo_hf.core.sublayer.norm_of", lambda *_: None)]
MOVEMENT = [
    (KERNELS + "gather_norm.use_triton", lambda _: False),
    (KERNELS + "scatter_add.use_triton", lambda _: False),
]
ROTARY = [("lemo_hf.core.attention_call._ROTARY", "none")]
GATED = [("lemo_hf.core.sublayer.gated_activations", lambda *_: None)]
ADAPTERS = [
    ("lemo_hf.core.attention_call.linear_of", lambda module, **_: module),
    ("lemo_hf.core.fused.linear_of", lambda module: module),
]
ATTENTION = [("lemo_hf.core.layer.fastest_attention", lambda *_: None)]
LOSS = [
    (KERNELS + "segment_cross_entropy.use_triton", lambda _: False),
    (KERNELS + "segment_cross_entropy.plain_weight", lambda *_: None),
]
WITHOUT = {
    "all kernels": [],
    "without norms": NORMS,
    "without norms and movement": NORMS + MOVEMENT,
    "without rotary": ROTARY,
    "without gated_activation": GATED,
    "without segment_cross_entropy": LOSS,
    "without LoRA in one product": ADAPTERS,
    "without choice of attention": ATTENTION,
    "none of these": NORMS + MOVEMENT + ROTARY + GATED + LOSS + ADAPTERS + ATTENTION,
}
# Provider, tokens, options of LeMoConfig, variants.
CASES = [
    ("lemo", 16384, {}, WITHOUT),
    ("lemo+checkpointing", 32768, {}, WITHOUT),
]


@contextmanager
def left_out(patches: list[tuple]) -> Iterator[None]:
    """Replace functions for a while."""
    with ExitStack() as stack:
        for target, replacement in patches:
            stack.enter_context(patch(target, replacement))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant")
    parser.add_argument("--commit", default="unknown", help="of lemo-hf, for the record")
    parser.add_argument("--output", type=Path, help="default: results/GPU/bench_ablation.json")
    args = parser.parse_args()
    device = torch.device("cuda")
    torch.manual_seed(0)
    command = command_line("bench_ablation.py", sys.argv[1:])
    header = {**environment(device), "commit": args.commit, "model": MODEL, "commands": [command]}
    slug = header["gpu"].lower().replace(" ", "-")
    path = args.output or RESULTS / slug / "bench_ablation.json"
    bench = Bench(MODEL, max(tokens for _, tokens, *_ in CASES), device)
    rows: list[dict] = []
    for provider, tokens, options, variants in CASES:
        samples: dict[str, list] = {name: [] for name in variants}
        for _ in range(args.rounds):
            for name, patches in variants.items():
                bench.options = options
                with left_out(patches):
                    samples[name].append(bench.real(provider_of(provider), tokens))
        for name, taken in samples.items():
            failed = [sample for sample in taken if isinstance(sample, str)]
            row = {"provider": provider, "tokens": tokens, "variant": name}
            row["status"] = failed[0] if failed else "ok"
            rows.append({**row, **({} if failed else summary(taken, tokens))})
            shown = failed or f"{rows[-1]['ms_median']:.0f} ms {rows[-1]['peak_gib']:.1f} GiB"
            print(f"{provider:24s} {tokens:6d} {name:36s} {shown}", flush=True)
        save(path, header, rows)


if __name__ == "__main__":
    main()
