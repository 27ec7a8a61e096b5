"""Questions over long documents: only answers have labels, and LeMo keeps blocks with their words.

    pip install "lemo-hf[peft,trl]"
    python examples/long_document_qa.py

By default it asks the repository's small model how passages of a book go on, in less than a minute
on a CPU. For a real run pass --model Qwen/Qwen3-8B --data your.jsonl (fields "document", "question"
and "answer" in each line) --tokens 32768.
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


def questions() -> Dataset:
    text, rows = (DEMO / "text/train-alice-adams.txt").read_text(encoding="utf-8"), []
    for start in range(2_000, 50_000, 1_000):
        words = text[start : start + 1_000].split()
        row = {"document": " ".join(words), "answer": " ".join(words[64:70])}
        rows.append({**row, "question": f"What follows {' '.join(words[60:64])!r}?"})
    return Dataset.from_list(rows)


def as_row(row: dict) -> dict:  # of an instruct model write these as lists of messages
    prompt = "{document}\n\nQuestion: {question}\nAnswer:".format(**row)
    return {"prompt": prompt, "completion": f" {row['answer']}"}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(DEMO / "model"))
parser.add_argument("--data", help="JSON lines; none: a book")
parser.add_argument("--tokens", type=int, default=512, help="tokens of the longest row")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--output", default="out/qa")
args = parser.parse_args()
gpu = torch.cuda.is_available()
data = load_dataset("json", data_files=args.data, split="train") if args.data else questions()
settings = SFTConfig(
    args.output, max_steps=args.steps, max_length=args.tokens, per_device_train_batch_size=1,
    gradient_accumulation_steps=4, learning_rate=1e-3, logging_steps=3, bf16=gpu,
)  # fmt: skip
trainer = LeMoSFTTrainer(
    args.model,
    settings,
    train_dataset=data.map(as_row, remove_columns=data.column_names),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    lemo_config=LeMoConfig(block_size=64 if gpu else 16),  # keeps 30 %
)
trainer.train()
trainer.save_model()
