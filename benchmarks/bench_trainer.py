"""Steps of completion rows in a plain loop, and by `LeMoTrainer` and `Trainer` as users run them.

A Trainer does more between two steps than the loop of `bench_completion.py`. It also waits for the
GPU at each step: it reads the loss and copies the next rows, so that the GPU waits for all that
follows. `LeMoTrainer` does neither. Times are those of many steps together, with one wait at the
end.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_completion import ANSWERS, RESULTS, RETENTIONS, options, parsed, providers
from model_shapes import LORA
from providers import Provider, provider_on
from record import GIB, environment, matmul_tflops, save
from steps import Bench, empty_memory, train_step, why
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer, remove_lemo
from lemo_hf.integrations.callback import LeMoCallback


class Rows(Dataset):
    """Random tokens, the last `ANSWERS` of them with labels."""

    def __init__(self, tokens: int, vocabulary: int, count: int):
        self.tokens, self.vocabulary, self.count = tokens, vocabulary, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.vocabulary, (self.tokens,), generator=generator)
        labels = ids.clone()
        labels[:-ANSWERS] = -100
        return {"input_ids": ids, "labels": labels}


class Clock:
    """Time of the steps after the first ``warm_up``, which are warm."""

    def __init__(self, device: torch.device, warm_up: int, last: int):
        self.device, self.warm_up, self.last = device, warm_up, last
        self.ms, self.peak_gib = 0.0, 0.0

    def step_ended(self, number: int) -> None:
        """``number`` of them have ended."""
        if number not in (self.warm_up, self.last):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            # The first steps record CUDA graphs, whose memory nothing allocates any more.
            self.peak_gib = max(self.peak_gib, torch.cuda.max_memory_allocated() / GIB)
        if number == self.warm_up:
            self._began = time.perf_counter()
        else:
            taken = time.perf_counter() - self._began
            self.ms = 1e3 * taken / (self.last - self.warm_up)


class Ticks(TrainerCallback):
    """Tells a clock of a Trainer's steps."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        """Counts it."""
        self.clock.step_ended(state.global_step)


def by_loop(bench: Bench, provider: Provider, args: argparse.Namespace, clock: Clock) -> None:
    """Steps as `bench_completion.py` takes them."""
    with provider_on(bench.models, provider, {}) as (model, _):
        step = partial(train_step, model, bench.optimizer, args.tokens, ANSWERS, args.rows)
        for number in range(clock.last):
            step()
            clock.step_ended(number + 1)


def by_trainer(
    kind: type[Trainer], bench: Bench, provider: Provider, args: argparse.Namespace, clock: Clock
) -> None:
    """Steps of a run by LeMoTrainer, or by Trainer with a LeMoCallback."""
    model: nn.Module = bench.models.model
    # Where a finish begins, graphs are recorded anew.
    config = LeMoConfig(**{"dense_finish": 0, **provider.lemo})
    cpu = clock.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=clock.last,
        per_device_train_batch_size=args.rows,
        optim="adamw_torch" if cpu else "adamw_torch_fused",
        logging_steps=clock.last,
        dataloader_num_workers=0 if cpu else 2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=cpu,
    )
    rows = Rows(args.tokens, model.get_base_model().config.vocab_size, args.rows * clock.last)
    callbacks: list[TrainerCallback] = [Ticks(clock)]
    own: dict[str, Any] = {"lemo_config": config}
    if kind is Trainer:
        callbacks, own = [LeMoCallback(config), *callbacks], {}
    trainer = kind(model, arguments, train_dataset=rows, callbacks=callbacks, **own)
    try:
        trainer.train()
    finally:
        remove_lemo(model)
        trainer.optimizer = None


WAYS: dict[str, Callable[..., None]] = {
    "loop": by_loop,
    "LeMoTrainer": partial(by_trainer, LeMoTrainer),
    "Trainer with LeMoCallback": partial(by_trainer, Trainer),
}


def run(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure all ways of each provider, ``--rounds`` times in turn; the file grows with them."""
    torch.manual_seed(0)
    header = {
        **environment(device),
        "commit": args.commit,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or "default",
        "lora": LORA,
        "labels": ANSWERS,
        "steps": args.steps,
        "matmul_tflops": matmul_tflops(device),
        "commands": [args.command],
    }
    path = args.output or RESULTS / header["gpu"].lower().replace(" ", "-") / "bench_trainer.json"
    bench = Bench(args.model, args.tokens, device, args.tiny)
    known = {provider.name: provider for provider in providers(RETENTIONS, ())}
    rows: dict[tuple[str, str], dict] = {}
    for _ in range(args.rounds):
        for name in args.providers:
            for way, take in WAYS.items():
                row = rows.setdefault((name, way), _empty(args, name, way))
                clock = Clock(device, args.warm_up, args.warm_up + args.steps)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                try:
                    take(bench, known[name], args, clock)
                    row["ms"].append(round(clock.ms, 2))
                    row["peak_gib"] = max(row["peak_gib"], round(clock.peak_gib, 2))
                except Exception as error:  # one way's failure must not cost the others' numbers
                    row["status"] = why(error)
                empty_memory(bench.optimizer)
                save(path, header, list(rows.values()))
                print(f"{name:20s} {way:26s} {row['status']} {row['ms']}", flush=True)
    return list(rows.values())


def _empty(args: argparse.Namespace, name: str, way: str) -> dict:
    row = {"model": args.model, "tokens": args.tokens, "rows": args.rows, "provider": name}
    return {**row, "way": way, "status": "ok", "ms": [], "peak_gib": 0.0}


def main() -> None:
    parser = options(__doc__, "bench_trainer")
    parser.set_defaults(rounds=3, providers=["lemo 0.3", "lemo 0.1", "lemo 0.1 +graph"])
    add = parser.add_argument
    add("--tokens", type=int, default=32768)
    add("--steps", type=int, default=20, help="that are timed together")
    add("--warm-up", type=int, default=4, help="steps before them")
    run(*parsed(parser, "bench_trainer"))


if __name__ == "__main__":
    main()
