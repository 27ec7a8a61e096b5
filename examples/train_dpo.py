"""Preference training (DPO) on long prompts with TRL, sparse: LoRA, the reference without it.

    pip install "lemo-hf[peft]" "trl>=1.16"
    python examples/train_dpo.py

By default it teaches the repository's small model to prefer a book's next paragraph to another one,
in less than a minute on a CPU. For a real run pass --model Qwen/Qwen3-8B --data your.jsonl (fields
"prompt", "chosen" and "rejected" in each line).
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import DPOConfig

from lemo_hf import LeMoConfig
from lemo_hf.integrations.trl_dpo import LeMoDPOTrainer

DEMO = Path(__file__).parent / "demo"


def book_as_pairs(path: Path) -> Dataset:
    """Prompts of four paragraphs, with the next paragraph and one from somewhere else."""
    parts = [part for part in path.read_text(encoding="utf-8").split("\n\n") if len(part) > 80]
    places = range(4, len(parts) // 2, 5)
    prompts = ["\n\n".join([*parts[i - 4 : i], ""]) for i in places]
    answers = {"chosen": [parts[i] for i in places], "rejected": [parts[-i] for i in places]}
    return Dataset.from_dict({"prompt": prompts, **answers})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "model"), help="Hub id or directory")
    parser.add_argument("--data", help="JSON lines with prompt, chosen and rejected; none: a book")
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", default="out/dpo")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    settings = {"max_length": None, "bf16": gpu, "per_device_train_batch_size": 1 if gpu else 2}
    settings["model_init_kwargs"] = {"dtype": "bfloat16" if gpu else "float32"}
    settings |= {"max_steps": args.steps, "learning_rate": 2e-3, "logging_steps": 3}
    data = book_as_pairs(DEMO / "text/train-alice-adams.txt")
    trainer = LeMoDPOTrainer(
        model=args.model,
        args=DPOConfig(output_dir=args.output, **settings),
        train_dataset=load_dataset("json", data_files=args.data)["train"] if args.data else data,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        # Completions are always kept, so smaller blocks leave more of short prompts to choose.
        lemo_config=LeMoConfig(retention=args.retention, block_size=32),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
