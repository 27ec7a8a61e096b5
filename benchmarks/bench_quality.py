"""What sparse training costs in quality: the same fine-tuning, dense and by LeMo, evaluated dense.

A small base model is extended to a longer context with LoRA, once for each configuration on the
same batches, and evaluated as the plain dense model on held-out text.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from record import environment, save
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer


def rows(path: Path, tokens: int, count: int) -> list[dict]:
    """The first ``count`` rows of ``tokens`` ids each, from a 1-D array of token ids."""
    ids = np.load(path)[: tokens * count].astype(np.int64).reshape(-1, tokens)
    return [{"input_ids": row, "labels": row} for row in ids]


def load(args: argparse.Namespace):
    """The base model with linear RoPE scaling to the longer context, and fresh LoRA."""
    config = AutoConfig.from_pretrained(args.model)
    factor = args.tokens / config.max_position_embeddings
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = args.tokens
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, config=config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets)).cuda()


@torch.no_grad()
def perplexity(model, samples: list[dict]) -> float:
    """Dense perplexity, mean over all tokens of windows that do not overlap."""
    model.eval()
    losses = []
    for sample in samples:
        ids = torch.as_tensor(sample["input_ids"])[None].cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def train(args: argparse.Namespace, options: dict | None, data, test) -> dict:
    """One row of the result: options, perplexity, seconds of training, retention."""
    model = load(args)
    settings = TrainingArguments(
        output_dir=args.output.parent / "trainer",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        bf16=True,
        logging_steps=args.steps,
        save_strategy="no",
        seed=args.seed,
        disable_tqdm=True,
    )
    config = None if options is None else LeMoConfig(**options)
    trainer = LeMoTrainer(model=model, args=settings, train_dataset=data, lemo_config=config)
    start = time.perf_counter()
    trainer.train()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    log = next(log for log in trainer.state.log_history if "loss" in log)
    return {
        "options": options,
        "perplexity": perplexity(model, test),
        "seconds": seconds,
        "retention": log.get("lemo/attention_retention", 1.0),
        "train_loss": log["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of the base model")
    parser.add_argument("--train", type=Path, required=True, help=".npy of token ids")
    parser.add_argument("--test", type=Path, required=True, help=".npy of token ids")
    parser.add_argument("--configs", type=Path, required=True, help="JSON list; null is dense")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--test-rows", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    begin = time.monotonic()
    data = rows(args.train, args.tokens, args.batch * args.steps)
    test = rows(args.test, args.tokens, args.test_rows)
    header = {
        **environment(torch.device("cuda")),
        **{k: str(v) for k, v in vars(args).items() if k not in ("output", "configs")},
        "before": perplexity(load(args), test),
    }
    done = []
    for options in json.loads(args.configs.read_text()):
        if time.monotonic() - begin > args.time_budget:
            break
        done.append(train(args, options, data, test))
        save(args.output, header, done)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in done[-1].items()})


if __name__ == "__main__":
    main()
