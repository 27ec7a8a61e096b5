"""QLoRA, sparse: a base model in 4 bits by bitsandbytes, LoRA on top.

    pip install "lemo-hf[peft]" "bitsandbytes>=0.50"
    python examples/train_qlora.py

By default it trains the repository's small model in less than a minute on a CPU. For a real run
pass --model meta-llama/Llama-3.1-8B --text your.txt --tokens 32768.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
)

from lemo_hf import LeMoConfig, LeMoTrainer

DEMO = Path(__file__).parent / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "model"), help="Hub id or directory")
    parser.add_argument("--text", default=str(DEMO / "text/train-alice-adams.txt"))
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a training row")
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", default="out/qlora")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype,
        device_map={"": 0} if gpu else "cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    # The trainer turns checkpointing on; with LeMo a layer then stores its kept rows alone.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    ids = tokenizer(Path(args.text).read_text(encoding="utf-8"))["input_ids"]
    rows = [ids[i : i + args.tokens] for i in range(0, len(ids) - args.tokens + 1, args.tokens)]

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
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        lemo_config=LeMoConfig(retention=args.retention),
    )
    trainer.train()
    trainer.save_model()  # the adapter, which PEFT loads without lemo-hf


if __name__ == "__main__":
    main()
