"""Summaries of long documents, where a dense step does not fit or is too slow.

    pip install "lemo-hf[peft,trl]"
    python examples/summarise.py

A summary needs its whole document: keep more than elsewhere, and let the last steps keep
everything. On news, dense training was better in equal time (docs/QUALITY.md). By default the first
sentence of a passage is its summary, with the repository's small model on a CPU. For a real run
pass --model meta-llama/Llama-3.1-8B --data your.jsonl --tokens 32768 (fields "document",
"summary").
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import SFTConfig

from lemo_hf import LeMoConfig
from lemo_hf.integrations.trl import LeMoSFTTrainer

DEMO = Path(__file__).parent / "demo"


def passages() -> Dataset:
    text = " ".join((DEMO / "text/train-alice-adams.txt").read_text(encoding="utf-8").split())
    rows = [text[start : start + 1_200] for start in range(2_000, 50_000, 1_200)]
    return Dataset.from_list([{"document": x, "summary": x.split(". ")[0][:120]} for x in rows])


def as_row(row: dict) -> dict:  # of an instruct model write these as lists of messages
    return {"prompt": f"{row['document']}\n\nSummary:", "completion": f" {row['summary']}"}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(DEMO / "model"))
parser.add_argument("--data", help="JSON lines; none: a book")
parser.add_argument("--tokens", type=int, default=512, help="tokens of the longest row")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--output", default="out/summaries")
args = parser.parse_args()
gpu = torch.cuda.is_available()
data = load_dataset("json", data_files=args.data, split="train") if args.data else passages()
settings = SFTConfig(
    args.output, max_steps=args.steps, max_length=args.tokens, per_device_train_batch_size=1,
    gradient_accumulation_steps=4, learning_rate=1e-3, logging_steps=3, bf16=gpu,
)  # fmt: skip
trainer = LeMoSFTTrainer(
    args.model,
    settings,
    train_dataset=data.map(as_row, remove_columns=data.column_names),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    lemo_config=LeMoConfig(retention=0.5, dense_finish=0.25, block_size=64 if gpu else 16),
)
trainer.train()
trainer.save_model()
