"""Supervised fine-tuning on chats with TRL, sparse: packed rows, loss on the assistant's turns.

    pip install "lemo-hf[peft]" "trl>=1.16"
    python examples/train_sft.py

By default it asks the repository's small model to go on with a book, in less than a minute on a
CPU. For a real run pass --model Qwen/Qwen3-8B --data your.jsonl (a field "messages" in each line)
--tokens 32768.
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
# For tokenizers that bring none; {% generation %} marks what assistant_only_loss trains.
TEMPLATE = """\
{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}\
{{ message['content'] + eos_token }}{% endgeneration %}{% else %}\
{{ message['role'] + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"""


def book_as_chats(path: Path) -> Dataset:
    """Each paragraph but the last of three asks for the next."""
    parts = [part for part in path.read_text(encoding="utf-8").split("\n\n") if len(part) > 80]
    chats = []
    for first, second, third in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        turns = [("user", first), ("assistant", second), ("user", "Go on."), ("assistant", third)]
        chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return Dataset.from_list(chats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "model"), help="Hub id or directory")
    parser.add_argument("--data", help="JSON lines with a field 'messages'; none: a book")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", default="out/sft")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    if args.data:
        data = load_dataset("json", data_files=args.data, split="train")
    else:
        data = book_as_chats(DEMO / "text/train-alice-adams.txt")

    gpu = torch.cuda.is_available()
    trainer = LeMoSFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=1 if gpu else 2,
            learning_rate=1e-3,
            max_length=args.tokens,
            packing=True,
            assistant_only_loss=True,
            bf16=gpu,
            model_init_kwargs={"dtype": "bfloat16" if gpu else "float32"},
            logging_steps=3,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        # Blocks with answers are always kept, so smaller blocks leave more of the rest to choose.
        lemo_config=LeMoConfig(retention=args.retention, block_size=32),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
