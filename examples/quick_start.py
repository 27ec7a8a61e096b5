"""Fine-tune a small model on a book, sparse, in less than a minute on a CPU.

    python examples/quick_start.py

By default it trains the repository's small model. For a real run pass --model
meta-llama/Llama-3.1-8B, --tokens 32768 and your own text file; the rest stays the same.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer

DEMO = Path(__file__).parent / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "model"), help="Hub id or directory")
    parser.add_argument("--text", default=str(DEMO / "text/train-alice-adams.txt"))
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a training row")
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", default="out/quick_start")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    ids = tokenizer(Path(args.text).read_text(encoding="utf-8"))["input_ids"]
    rows = [ids[i : i + args.tokens] for i in range(0, len(ids) - args.tokens + 1, args.tokens)]

    trainer = LeMoTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=3e-4,
            activation_checkpointing=True,  # transformers 5.17: gradient_checkpointing
            logging_steps=3,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        lemo_config=LeMoConfig(retention=args.retention),
    )
    trainer.train()
    trainer.save_model()  # a plain model: from_pretrained loads it without lemo-hf
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
