"""Teach the base model to look values up within its own context, before any of it is extended.

The small base model does not retrieve. Batches of text and batches of answers alone take turns, so
that both count the same; dense, all weights, at the context that the model has.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.quality.data import Data
from lemo_hf.eval.perplexity import perplexity
from lemo_hf.eval.retrieval import retrieval

SHARD = "14MB"


class TakingTurns(Dataset):
    """A batch of one set, a batch of the other, and so on; each starts again when it ends."""

    def __init__(self, sets: Sequence[Dataset], batch: int, steps: int):
        self.sets, self.batch, self.steps = sets, batch, steps

    def __len__(self) -> int:
        return self.batch * self.steps

    def __getitem__(self, place: int) -> dict:
        step, row = divmod(place, self.batch)
        rows = self.sets[step % len(self.sets)]
        return rows[(step // len(self.sets) * self.batch + row) % len(rows)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("output", type=Path, help="where the model goes")
    add("--model", required=True, help="directory of the base model")
    add("--data", type=Path, required=True, help="folder made by prepare.py")
    add("--sets", nargs=2, default=["many-lines-quarter", "many-answers-quarter"])
    add("--steps", type=int, default=600)
    add("--batch", type=int, default=32)
    add("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args(argv)
    data = Data.load(args.data)
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    context = model.config.max_position_embeddings
    settings = TrainingArguments(
        output_dir=args.output / "trainer",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        train_sampling_strategy="sequential",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=max(1, args.steps // 12),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = TakingTurns([data.train[name] for name in args.sets], args.batch, args.steps)
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.output, max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
    needles = [
        row for row in data.needles[data.digits[args.sets[0]]] if len(row.input_ids) == context
    ]
    tests = [row[:context] for row in data.test["books"]]
    facts = {
        "accuracy": retrieval(model, needles, batch_size=16, progress=False).mean(),
        "books": perplexity(
            model, tests, max_length=context, stride=context, progress=False
        ).perplexity,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        **{key: str(value) for key, value in vars(args).items()},
    }
    (args.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
