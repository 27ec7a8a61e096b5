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
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# PEFT imports bitsandbytes, which warns of kernels for 4-bit weights that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import accelerate
import peft
import torch
import transformers
from clock import OPEN, Clock
from plot import draw
from setting import HERE, ROPE, TOKENS, cut, load_model, quotation_rows, rows
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from lemo_hf import LeMoConfig, LeMoTrainer, __version__
from lemo_hf.tune.measure import saved_bytes

LORA = dict(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
LEARNING_RATE = 1e-3  # the highest: it warms up, and then falls by a cosine over the time
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
            "learning_rate": LEARNING_RATE,
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
    clock = Clock(args.seconds)
    if lemo is not None and task.name == "text":  # its last steps keep everything
        clock = Clock(args.seconds, lemo.finish, task.results["dense"]["step_seconds"])
    print(f"\n{way}")
    trainer = make_trainer(task, way, clock, args)
    if "before" not in task.results:
        task.results["before"] = {"perplexity": perplexity(trainer)}
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    retentions = [log.get("lemo/attention_retention", 1.0) for log in logs]
    length = len(trainer.train_dataset[0]["input_ids"])
    task.results[way] = {
        "perplexity": perplexity(trainer),
        "train_seconds": clock.ends[-1],
        "steps": trainer.state.global_step,
        "step_seconds": clock.ends[-1] / len(clock.ends),
        "rows": trainer.state.global_step * trainer.args.train_batch_size * length / TOKENS,
        "kept_tokens": length * sum(retentions) / len(retentions),
        "saved_mib": training_bytes(trainer) / 2**20,
    }
    if lemo is not None:
        task.kept = kept_blocks(trainer.lemo)


def make_trainer(task: Task, way: str, clock: Clock, args) -> Trainer:
    """A LoRA model whose positions are scaled to the new context, and its Trainer."""
    set_seed(args.seed)
    model = peft.get_peft_model(load_model(), peft.LoraConfig(**LORA))
    halves = way == "rows cut in half"
    kind = partial(LeMoTrainer, lemo_config=task.lemo) if way == "LeMo" else Trainer
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0)
    trainer = kind(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=OPEN,
            seed=args.seed,
            per_device_train_batch_size=2 if halves else 1,
            per_device_eval_batch_size=2,
            prediction_loss_only=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=cut(task.train) if halves else task.train,
        eval_dataset=task.heldout,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, clock.rate)),
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
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
