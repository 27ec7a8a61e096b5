"""DPO steps of long prompts with two completions: TRL, TRL with Liger's kernels, and LeMo.

Needs TRL (``pip install "trl>=1.16"``); takes Liger where liger_kernel is installed. Trainers are
TRL's own, with LoRA, gradient checkpointing and the reference by the model without its adapter.
They take turns; each turn is a process of its own, since Liger patches transformers for good.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from model_shapes import LORA, SHAPES, build_model
from record import GIB, command_line, environment, matmul_tflops, save, summary
from steps import why
from transformers import AutoTokenizer, TrainerCallback

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RETENTIONS = (0.3, 0.15)


def providers() -> list[str]:
    """Names of who takes part."""
    liger = ["trl+liger"] if find_spec("liger_kernel") else []
    return ["trl", *liger, *(f"lemo {share:g}" for share in RETENTIONS)]


class Timer(TrainerCallback):
    """Milliseconds and peaks of each optimizer step."""

    def __init__(self, device: torch.device):
        self.device, self.samples = device, []

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The batch is there."""
        self._start = self._now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Backward and optimizer are through."""
        sample = {"ms": 1e3 * (self._now() - self._start), "peak_gib": 0.0, "reserved_gib": 0.0}
        if self.device.type == "cuda":
            sample["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            sample["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        self.samples.append(sample)


def trainer_of(provider: str, args: argparse.Namespace, folder: str, timer: Timer) -> Any:
    """The trainer of one turn, on a model of its own."""
    from peft import LoraConfig
    from token_pairs import token_pairs, trainer_class
    from trl import DPOConfig

    from lemo_hf import LeMoConfig

    kind, _, share = provider.partition(" ")
    longest = args.prompt + args.completion
    model = build_model(args.model, longest, timer.device, args.tiny).unload()
    vocabulary = model.config.vocab_size
    lengths = {"prompt": args.prompt, "chosen": args.completion, "rejected": args.completion}
    rows = {
        f"{name}_ids": torch.randint(1, vocabulary, (args.steps + 1, n)).tolist()
        for name, n in lengths.items()
    }

    options = {"lemo_config": LeMoConfig(retention=float(share))} if kind == "lemo" else {}
    targets = list(SHAPES[args.model].targets)
    return trainer_class(kind == "lemo")(
        model=model,
        args=DPOConfig(
            output_dir=folder,
            max_steps=args.steps + 1,
            per_device_train_batch_size=1,
            max_length=None,
            gradient_checkpointing=True,
            bf16=timer.device.type == "cuda",
            use_cpu=timer.device.type == "cpu",
            use_liger_kernel=kind == "trl+liger",
            optim="adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=token_pairs(rows, "random rows"),
        processing_class=AutoTokenizer.from_pretrained(ROOT / "examples/demo/model"),
        peft_config=LoraConfig(**LORA | {"target_modules": targets}, task_type="CAUSAL_LM"),
        callbacks=[timer],
        **options,
    )


def turn(provider: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Steps of ``provider`` after one that is not counted, or what went wrong."""
    torch.manual_seed(0)
    timer = Timer(device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(provider, args, folder, timer)
            trainer.train()
    except Exception as error:  # one provider's failure must not cost the others' numbers
        return {"status": why(error)}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    samples = [{**x, "loss": y} for x, y in zip(timer.samples, losses, strict=True)][1:]
    return {"status": "ok", "samples": samples}


def in_a_process(provider: str, argv: list[str]) -> dict:
    """A turn by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turn.json"
        own = ["--turn", provider, "--output", str(path)]
        ended = subprocess.run([sys.executable, __file__, *argv, *own], check=False)
        if not path.is_file():
            return {"status": f"failed: the process ended with {ended.returncode}"}
        return json.loads(path.read_text(encoding="utf-8"))


def run(args: argparse.Namespace, argv: list[str], device: torch.device) -> list[dict]:
    """All providers in turns; the file is written anew after each turn."""
    header = {
        **environment(device, ("torch", "triton", "transformers", "peft", "trl")),
        "liger_kernel": "installed" if find_spec("liger_kernel") else "not installed",
        "commit": args.commit,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or "default",
        "lora": LORA,
        "matmul_tflops": matmul_tflops(device),
        "commands": [args.command],
    }
    slug = header["gpu"].lower().replace(" ", "-")
    path = args.output or RESULTS / slug / "bench_preference.json"
    tokens = 2 * (args.prompt + args.completion)
    samples: dict[str, list[dict]] = {name: [] for name in args.providers or providers()}
    rows: dict[str, dict] = {}
    for _ in range(args.rounds):
        for name in samples:
            found = in_a_process(name, argv)
            samples[name] += found.get("samples", [])
            rows[name] = {"model": args.model, "prompt": args.prompt, "provider": name}
            rows[name] |= {"completion": args.completion, "status": found["status"]}
            if samples[name]:
                rows[name] |= summary(samples[name], tokens)
            save(path, header, list(rows.values()))
            shown = {k: rows[name].get(k) for k in ("ms_median", "peak_gib", "loss")}
            print(f"{name:12s} {rows[name]['status']:8s} {shown}", flush=True)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="Llama-3 8B", help="of benchmarks/model_shapes.py")
    add("--prompt", type=int, default=32768, help="tokens")
    add("--completion", type=int, default=1024, help="tokens of each of the two")
    add("--providers", nargs="+", metavar="NAME", help=f"of {providers()}; all if not given")
    add("--steps", type=int, default=3, help="that are timed in a turn")
    add("--rounds", type=int, default=2, help="turns of each")
    add("--commit", default="unknown", help="of lemo-hf, for the record")
    add("--output", type=Path, help="default: benchmarks/results/GPU/bench_preference.json")
    add("--tiny", action="store_true", help="tiny models on the CPU: does the script run?")
    add("--turn", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.command = command_line("bench_preference.py", sys.argv[1:])
    if find_spec("trl") is None:
        raise SystemExit(
            "bench_preference.py compares with TRL, which is not installed: pip install "
            "'trl>=1.16' liger-kernel (without a network: pip download them elsewhere, then pip "
            "install --no-index --find-links FOLDER)."
        )
    if not (args.tiny or torch.cuda.is_available()):
        raise SystemExit("bench_preference.py measures on a CUDA GPU, and there is none.")
    device = torch.device("cpu" if args.tiny else "cuda")
    if args.turn is None:
        run(args, sys.argv[1:], device)
    else:
        args.output.write_text(json.dumps(turn(args.turn, args, device)), encoding="utf-8")


if __name__ == "__main__":
    main()
