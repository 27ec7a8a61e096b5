"""Code of whole repositories: rows in which a file sees the files before it.

    pip install "lemo-hf[peft]"
    python examples/repository_code.py

By default it trains the repository's small model on this package's own code, in less than a minute
on a CPU. For a real run pass --model Qwen/Qwen2.5-Coder-7B --tokens 32768 and as many folders of
code as you have: --code one two three.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer
from lemo_hf.storage.text_rows import token_rows

ROOT = Path(__file__).parent.parent


def as_text(folder: Path, ending: str) -> str:
    """All files of a repository, one after the other; those of one folder stay together."""
    paths = sorted(folder.rglob(f"*{ending}"))
    texts = [f"# file: {p.relative_to(folder)}\n{p.read_text(encoding='utf-8')}" for p in paths]
    return "\n".join(texts)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(ROOT / "examples/demo/model"))
parser.add_argument("--code", nargs="+", type=Path, default=[ROOT / "lemo_hf/batch"])
parser.add_argument("--ending", default=".py")
parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--output", default="out/code")
args = parser.parse_args()
gpu, tokenizer = torch.cuda.is_available(), AutoTokenizer.from_pretrained(args.model)
rows = token_rows((as_text(path, args.ending) for path in args.code), tokenizer, args.tokens)
dtype = torch.bfloat16 if gpu else torch.float32
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
targets = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
settings = TrainingArguments(
    args.output, max_steps=args.steps, per_device_train_batch_size=1 if gpu else 4,
    learning_rate=1e-3, logging_steps=3, bf16=gpu,
)  # fmt: skip
trainer = LeMoTrainer(
    model=get_peft_model(model, targets),
    args=settings,
    train_dataset=rows,
    processing_class=tokenizer,
    lemo_config=LeMoConfig(chunk_size=512 if gpu else 128, recompute="selective"),
)
trainer.train()
trainer.save_model()
