"""Fine-tune a causal LM on long text with LoRA, sparse.

    python examples/train_lora.py --model meta-llama/Llama-3.1-8B --data books.jsonl --tokens 32768

Works under `accelerate launch` as it is. The adapter that is saved loads with PEFT alone.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name on the Hub or directory")
    parser.add_argument("--data", required=True, help="JSON lines with a field 'text'")
    parser.add_argument("--tokens", type=int, default=32768, help="length of a training row")
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="out/lora")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))

    def cut(batch: dict) -> dict:
        """Documents end to end, cut into rows of one length; what is left over is dropped."""
        ids = [i for text in batch["text"] for i in [*tokenizer(text)["input_ids"], eos]]
        rows = [ids[i : i + args.tokens] for i in range(0, len(ids) - args.tokens + 1, args.tokens)]
        return {"input_ids": rows, "labels": rows}

    eos = tokenizer.eos_token_id
    data = load_dataset("json", data_files=args.data, split="train")
    data = data.map(cut, batched=True, batch_size=64, remove_columns=data.column_names)

    trainer = LeMoTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=True,
            logging_steps=10,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        lemo_config=LeMoConfig(retention=args.retention),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
