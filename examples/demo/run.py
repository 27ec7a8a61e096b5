"""Extend a small model's context fourfold by LoRA fine-tuning: dense, rows cut in half, and LeMo.

    python examples/demo/run.py --output out/demo

Model and texts lie next to this script and two CPU cores are enough: see PROVENANCE.md. There are
two tasks: to continue quotations from far back in the row, and to predict every token of a book.
In each, every way of training has the same time, the same initial weights and the same data in the
same order; who is faster sees more of it. All models are evaluated dense, on whole rows.
"""

import argparse
import json
import logging
import math
import platform
import statistics
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# PEFT imports bitsandbytes, which warns of kernels for 4-bit weights that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import accelerate
import peft
import torch
import transformers
from plot import draw
from setting import HERE, ROPE, TOKENS, cut, load_model, quotation_rows, rows
from transformers import (
    AutoTokenizer,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from lemo_hf import LeMoConfig, LeMoTrainer, __version__
from lemo_hf.tune.measure import saved_bytes

LORA = dict(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
TRAINING = dict(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=3, logging_steps=1)
PROBED = 5  # steps of a way of training, of which the last ones tell how many there is time for
WAYS = ("dense", "rows cut in half", "LeMo")


@dataclass
class Task:
    """Rows to train on and rows held out, and how LeMo trains on them."""

    name: str
    train: list[dict]
    heldout: list[dict]
    lemo: LeMoConfig
    results: dict[str, dict] = field(default_factory=dict)
    kept: list[list[int]] = field(default_factory=list)


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, *args, **kwargs):
        """The batch is there."""
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        """The optimizer is through."""
        self.times.append(time.perf_counter() - self.began)


class Deadline(TrainerCallback):
    """Ends a run that other work on the machine has made too slow."""

    def __init__(self, seconds):
        self.end = time.perf_counter() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        """It was the last one."""
        control.should_training_stop |= time.perf_counter() > self.end


@contextmanager
def quiet():
    """LeMo says nothing within it."""
    logger = logging.getLogger("lemo_hf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


class QuietProgress(ProgressCallback):
    """Trainer's progress bar with the loss in it, rather than one printed dictionary a log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """The bar says it."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def main() -> None:
    """Train three times for each task, evaluate, and write the tables, the picture, the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    parser.add_argument("--seconds", type=float, default=25.0, help="of training, each time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    tasks = [
        Task(
            "quotations",
            quotation_rows(tokenizer, "train-*.txt"),
            quotation_rows(tokenizer, "heldout-*.txt")[::8],
            LeMoConfig(retention=0.3),
        ),
        Task(
            "text",
            rows(tokenizer, "train-*.txt"),
            rows(tokenizer, "heldout-*.txt")[::6],
            LeMoConfig(retention=0.5, chunk_size=256),  # 2,048 tokens are short for the default
        ),
    ]
    for task in tasks:
        print(
            f"\n{task.name}: {len(task.train)} rows of {TOKENS} tokens to train on, "
            f"{len(task.heldout)} held out; {args.seconds:g} s of training each"
        )
        for way in WAYS:
            run(task, way, args)
        print(f"\n{format_table(task)}")
    print("\nPerplexity: held-out books, all tokens kept, of the labels. Less is better.")
    draw(args.output / "demo.png", tasks)
    report = {
        "results": {task.name: task.results for task in tasks},
        "kept_blocks": {task.name: task.kept for task in tasks},
        "settings": {
            "tokens": TOKENS,
            "rope": ROPE,
            "seconds": args.seconds,
            "seed": args.seed,
            "lora": LORA,
            "training": TRAINING,
            "lemo": {task.name: task.lemo.to_dict() for task in tasks},
        },
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft)},
            "accelerate": accelerate.__version__,
            "lemo_hf": __version__,
        },
        "torch_threads": torch.get_num_threads(),
        "total_seconds": time.perf_counter() - started,
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote demo.png and report.json to {args.output} in {report['total_seconds']:.0f} s.")


def run(task: Task, way: str, args) -> None:
    """Train in one way for ``args.seconds``, and evaluate."""
    lemo = task.lemo if way == "LeMo" else None
    with quiet():
        probe = make_trainer(task, way, PROBED, args)
    clock = Clock()
    probe.add_callback(clock)
    with quiet():
        probe.train()
    if "before" not in task.results:
        task.results["before"] = {"perplexity": perplexity(make_trainer(task, "dense", 1, args))}
    step = statistics.median(clock.times[1:])
    finish = 0.0
    if lemo is not None and task.name == "text":  # its last steps keep everything
        step = statistics.median(clock.times[1:-1])
        finish = lemo.finish
    whole = task.results.get("dense", {}).get("step_seconds", step)
    steps = max(5, round(args.seconds / ((1 - finish) * step + finish * whole)))
    print(f"\n{way}: {steps} steps")
    trainer = make_trainer(task, way, steps, args)
    trainer.add_callback(Deadline(1.15 * args.seconds))
    seconds = trainer.train().metrics["train_runtime"]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    retentions = [log.get("lemo/attention_retention", 1.0) for log in logs]
    length = len(trainer.train_dataset[0]["input_ids"])
    task.results[way] = {
        "perplexity": perplexity(trainer),
        "train_seconds": seconds,
        "steps": trainer.state.global_step,
        "step_seconds": step,
        "rows": trainer.state.global_step * trainer.args.train_batch_size * length / TOKENS,
        "kept_tokens": length * sum(retentions) / len(retentions),
        "saved_mib": training_bytes(trainer) / 2**20,
    }
    if lemo is not None:
        task.kept = kept_blocks(trainer.lemo)


def make_trainer(task: Task, way: str, steps: int, args) -> Trainer:
    """A LoRA model whose positions are scaled to the new context, and its Trainer."""
    set_seed(args.seed)
    model = load_model()
    halves = way == "rows cut in half"
    kind = partial(LeMoTrainer, lemo_config=task.lemo) if way == "LeMo" else Trainer
    trainer = kind(
        model=peft.get_peft_model(model, peft.LoraConfig(**LORA)),
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=steps,
            seed=args.seed,
            per_device_train_batch_size=2 if halves else 1,
            per_device_eval_batch_size=2,
            prediction_loss_only=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=steps in (1, PROBED),
            use_cpu=True,
            dataloader_pin_memory=False,
            **TRAINING,
        ),
        train_dataset=cut(task.train) if halves else task.train,
        eval_dataset=task.heldout,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(QuietProgress)
    return trainer


def perplexity(trainer) -> float:
    """On the held-out rows, by the whole model: evaluation is never sparse."""
    return math.exp(trainer.evaluate()["eval_loss"])


def training_bytes(trainer) -> int:
    """Bytes that one training pass keeps for its backward."""
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    return saved_bytes(model, lambda: trainer.compute_loss(model, batch))


def kept_blocks(lemo) -> list[list[int]]:
    """``[layers][blocks]``: 1 where a layer kept a block of the first row of the last pass."""
    passed = lemo.passes.tally.kept_blocks
    dense = torch.ones_like(next(iter(passed.values())))
    layers = range(len(lemo.rules))
    return [passed.get((layer, "attention"), dense)[0].int().tolist() for layer in layers]


def format_table(task: Task) -> str:
    """The results of a task as aligned plain text, one way of training a line; the best first."""
    columns = {
        "perplexity": ("perplexity", ".2f"),
        "train_seconds": ("training s", ".0f"),
        "steps": ("steps", ",.0f"),
        "rows": ("rows seen", ",.0f"),
        "kept_tokens": ("kept of a row", ",.0f"),
        "saved_mib": ("saved MiB", ".0f"),
    }
    lines = [[task.name, *(title for title, _ in columns.values())]]
    for name, result in sorted(task.results.items(), key=lambda item: item[1]["perplexity"]):
        cells = [
            f"{result[key]:{form}}" if key in result else "" for key, (_, form) in columns.items()
        ]
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


if __name__ == "__main__":
    main()
