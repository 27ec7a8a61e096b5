"""Trajectories of an agent: many turns with a tool's answers, labels on the assistant's turns.

    pip install "lemo-hf[peft,trl]"
    python examples/agent_trajectories.py

By default an agent looks words up in a book, with the repository's small model, in less than a
minute on a CPU. For a real run pass --model Qwen/Qwen3-8B --data your.jsonl --tokens 32768; each
line has a field "messages" (and "tools", if the chat template shows them).
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig

from lemo_hf import LeMoConfig
from lemo_hf.integrations.trl import LeMoSFTTrainer

DEMO = Path(__file__).parent / "demo"
# Of the small model, which has none. {% generation %} marks what assistant_only_loss trains.
TEMPLATE = """{% for turn in messages %}{{ turn['role'] + ': ' }}{% generation %}\
{% if turn['role'] == 'assistant' %}{{ turn['content'] + eos_token }}{% endif %}{% endgeneration %}\
{% if turn['role'] != 'assistant' %}{{ turn['content'] + '\n' }}{% endif %}{% endfor %}"""


def lookups() -> Dataset:
    lines = (DEMO / "text/train-alice-adams.txt").read_text(encoding="utf-8").splitlines()[300:]
    rows = []
    for word in ("Alice", "mother", "window", "dance", "father", "letter", "dinner", "street") * 4:
        found = [line for line in lines if word in line][len(rows) // 8 :: 9][:8]
        says = [("user", f"Where is {word!r}?"), ("assistant", f"grep {word}")]
        says += [("tool", "\n".join(found)), ("assistant", f"In {len(found)} lines: {found[0]}")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in says]})
    return Dataset.from_list(rows)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(DEMO / "model"))
parser.add_argument("--data", help="JSON lines; none: look-ups in a book")
parser.add_argument("--tokens", type=int, default=512, help="tokens of the longest row")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--output", default="out/agent")
args = parser.parse_args()
gpu, tokenizer = torch.cuda.is_available(), AutoTokenizer.from_pretrained(args.model)
tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
settings = SFTConfig(
    args.output, max_steps=args.steps, max_length=args.tokens, per_device_train_batch_size=1,
    gradient_accumulation_steps=4, learning_rate=1e-3, logging_steps=3, bf16=gpu,
    assistant_only_loss=True,
)  # fmt: skip
data = load_dataset("json", data_files=args.data, split="train") if args.data else lookups()
lora, lemo = LoraConfig(target_modules="all-linear"), LeMoConfig(block_size=64 if gpu else 16)
options = {"processing_class": tokenizer, "peft_config": lora, "lemo_config": lemo}
trainer = LeMoSFTTrainer(args.model, settings, train_dataset=data, **options)
trainer.train()
trainer.save_model()
