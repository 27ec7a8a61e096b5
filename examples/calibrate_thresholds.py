"""Find a score threshold for each layer by the paper's Algorithm 1, then train with them.

    python examples/calibrate_thresholds.py

By default it uses the repository's small model and a few rows of a book, in less than a minute on a
CPU. For a real run pass --model meta-llama/Llama-3.1-8B --data books.jsonl --tokens 8192
--block-size 64 --rows 8; `lemo calibrate` does the same in a shell.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer
from lemo_hf.storage.text_rows import load_documents, token_rows
from lemo_hf.tune.calibrate import calibrate_thresholds

DEMO = Path(__file__).parent / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "model"), help="Hub id or directory")
    parser.add_argument("--data", default=str(DEMO / "text/train-alice-adams.txt"))
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rows", type=int, default=4, help="rows to calibrate on")
    parser.add_argument(
        "--retention", type=float, default=0.5, help="mean retention of the sparse layers"
    )
    parser.add_argument("--calibration-steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", default="out/calibrated")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if gpu else torch.float32
    ).to("cuda" if gpu else "cpu")
    most = args.rows + 2 * args.steps
    rows = token_rows(load_documents(args.data), tokenizer, args.tokens, max_rows=most)

    start = LeMoConfig(policy="pooled", block_size=args.block_size, dense_first_layers=2)
    found = calibrate_thresholds(
        model, rows[: args.rows], start, args.retention, steps=args.calibration_steps
    )
    for name, step in (("one threshold", found.history[0]), ("one each", found.history[-1])):
        rise, kept = step["loss_rise"], step["retention"]
        print(f"{name}: {rise:.4f} nats above dense, mean retention {kept:.3f}")
    print("thresholds:", *(f"{threshold:.3g}" for threshold in found.config.threshold))

    trainer = LeMoTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=1 if gpu else 2,
            learning_rate=3e-4,
            bf16=gpu,
            activation_checkpointing=True,  # transformers 5.17: gradient_checkpointing
            logging_steps=3,
        ),
        train_dataset=rows[args.rows :],
        processing_class=tokenizer,
        lemo_config=found.config,
    )
    trainer.train()
    trainer.save_model()  # with lemo_config.json, which holds the thresholds


if __name__ == "__main__":
    main()
