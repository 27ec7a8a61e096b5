"""Extend a small model's context fourfold by LoRA fine-tuning, once dense and once with LeMo.

    python examples/demo/run.py --output out/demo

Model and texts lie next to this script and two CPU cores are enough: see PROVENANCE.md. Both runs
have the same data in the same order, the same initial weights and the same number of steps. LeMo's
training passes leave half of the tokens out of most layers; both models are evaluated dense.
"""

import argparse
import json
import math
import platform
import time
import warnings
from pathlib import Path

import accelerate
import peft
import torch
import transformers
from plot import draw
from setting import HERE, ROPE, TOKENS, load_model, rows
from transformers import (
    AutoTokenizer,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from lemo_hf import LeMoConfig, LeMoTrainer, __version__
from lemo_hf.tune.measure import saved_bytes

LORA = dict(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
TRAINING = dict(
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=5,
    logging_steps=1,
)
# Layers that agree: a kept set of their own for each ends 3.5 % higher than dense here.
LEMO = LeMoConfig(retention=0.5, chunk_size=256)  # rows of 2,048 tokens are short for the default


def main() -> None:
    """Train twice, evaluate three times, and write the table, the picture and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    train, heldout = rows(tokenizer, "train-*.txt"), rows(tokenizer, "heldout-*.txt")[::3]
    print(
        f"{TOKENS} tokens a row: {len(train)} rows to train on, {len(heldout)} held out. "
        f"{args.steps} steps of {TRAINING['per_device_train_batch_size']} rows, dense and LeMo."
    )
    results, kept = {}, None
    for name, lemo_config in (("dense", None), ("LeMo", LEMO)):
        print(f"\n{name}")
        trainer = make_trainer(lemo_config, train, heldout, args)
        if lemo_config is None:
            results["before"] = {"perplexity": perplexity(trainer)}
        seconds = trainer.train().metrics["train_runtime"]
        logs = [log for log in trainer.state.log_history if "loss" in log]
        retentions = [log.get("lemo/attention_retention", 1.0) for log in logs]
        results[name] = {
            "perplexity": perplexity(trainer),
            "train_seconds": seconds,
            "tokens_per_second": args.steps * trainer.args.train_batch_size * TOKENS / seconds,
            "kept_tokens": TOKENS * sum(retentions) / len(retentions),
            "saved_mib": training_bytes(trainer) / 2**20,
            "loss": [log["loss"] for log in logs],
        }
        if lemo_config is not None:
            kept = kept_blocks(trainer.lemo)

    results["ratio"] = {
        key: value / results["dense"][key]
        for key, value in results["LeMo"].items()
        if key != "loss"
    }
    table = format_table(results)
    print(f"\n{table}\n\nTraining is sparse, evaluation dense. Perplexity: held-out books.")
    draw(args.output / "demo.png", kept, results, LEMO)
    report = {
        "results": results,
        "kept_blocks": kept.tolist(),
        "settings": {
            "tokens": TOKENS,
            "rope": ROPE,
            "steps": args.steps,
            "seed": args.seed,
            "train_rows": len(train),
            "heldout_rows": len(heldout),
            "lora": LORA,
            "training": TRAINING,
            "lemo": LEMO.to_dict(),
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


def make_trainer(lemo_config, train, heldout, args) -> LeMoTrainer:
    """A LoRA model whose positions are scaled to the new context, and its Trainer."""
    set_seed(args.seed)
    model = load_model()
    trainer = LeMoTrainer(
        model=peft.get_peft_model(model, peft.LoraConfig(**LORA)),
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            seed=args.seed,
            per_device_eval_batch_size=2,
            prediction_loss_only=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            **TRAINING,
        ),
        train_dataset=train,
        eval_dataset=heldout,
        lemo_config=lemo_config,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    return trainer


class QuietProgress(ProgressCallback):
    """Trainer's progress bar with the loss in it, rather than one printed dictionary a log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def perplexity(trainer) -> float:
    """On the held-out rows, by the whole model: evaluation is never sparse."""
    return math.exp(trainer.evaluate()["eval_loss"])


def training_bytes(trainer) -> int:
    """Bytes that one training pass keeps for its backward."""
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    return saved_bytes(model, lambda: trainer.compute_loss(model, batch))


def kept_blocks(lemo) -> torch.Tensor:
    """``[samples, layers, blocks]``: 1 where a layer kept a block of a sample of the last pass."""
    passed = lemo.passes.tally.kept_blocks
    dense = torch.ones_like(next(iter(passed.values())))
    layers = range(len(lemo.rules))
    return torch.stack([passed.get((layer, "attention"), dense) for layer in layers], 1).int()


def format_table(results: dict) -> str:
    """The results as aligned plain text, one run a line."""
    columns = {
        "perplexity": ("perplexity", ".2f"),
        "train_seconds": ("training s", ".1f"),
        "tokens_per_second": ("tokens/s", ",.0f"),
        "kept_tokens": (f"kept of {TOKENS:,}", ",.0f"),
        "saved_mib": ("saved MiB", ".1f"),
    }
    lines = [["", *(title for title, _ in columns.values())]]
    for name, result in results.items():
        cells = [
            f"{result[key]:{'.3f' if name == 'ratio' else form}}" if key in result else "-"
            for key, (_, form) in columns.items()
        ]
        lines.append(["LeMo / dense" if name == "ratio" else name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


if __name__ == "__main__":
    main()
