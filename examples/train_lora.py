"""Fine-tune a causal LM on long text with LoRA, sparse.

    python examples/train_lora.py

By default it trains the repository's small model on a book, in less than a minute on a CPU. For a
real run pass --model meta-llama/Llama-3.1-8B --data books.jsonl --tokens 32768 (a field "text" in
each line, or a data set of the Hub). The script also works under `accelerate launch`, see
multi_gpu.sh. PEFT alone loads the saved adapter.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer
from lemo_hf.storage.text_rows import load_documents, token_rows

DEMO = Path(__file__).parent / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "model"), help="Hub id or directory")
    parser.add_argument("--data", default=str(DEMO / "text/train-alice-adams.txt"))
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a training row")
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", default="out/lora")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))

    # Documents cut into rows of one length; what is left over of each is dropped.
    rows = token_rows(load_documents(args.data), tokenizer, args.tokens, max_rows=10_000)

    trainer = LeMoTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=1 if gpu else 2,
            learning_rate=1e-3,
            bf16=gpu,
            activation_checkpointing=True,  # transformers 5.17: gradient_checkpointing
            logging_steps=3,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        lemo_config=LeMoConfig(retention=args.retention),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
