"""Predictors of a real model: how they are best trained, what they recall, and what they cost.

Recall is measured on documents that neither the model nor the predictors were trained on, and again
after the model was fine-tuned with LoRA (drift). Cost: one layer's predictor at the sizes of
Llama-3 8B.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from record import command_line, environment, measure, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from lemo_hf import LeMoConfig, LeMoPredictor, LeMoTrainer, apply_lemo, remove_lemo
from lemo_hf.recall import BASELINES, recall_table
from lemo_hf.train_predictor import PredictorTraining, train_predictor

# What is compared: name, epochs, settings. The first two are the predictors that are reported.
TRAININGS = {
    "sum": (2, {"heads": ("attention", "mlp")}),
    "normalised": (2, {"normalize_scores": True}),
    "ranking": (1, {}),
    "regression": (1, {"loss": "regression"}),
    "distillation": (1, {"loss": "distillation"}),
    "no pruning": (1, {"rarely": 0.0}),
    "pruned below 10 %": (1, {"rarely": 0.1}),
    "causal": (1, {"normalize_scores": True, "causal": True}),
}
COST = {"hidden_size": 4096, "tokens": 16384}


def load(args: argparse.Namespace) -> nn.Module:
    """The model with linear RoPE scaling to the longer context."""
    config = AutoConfig.from_pretrained(args.model)
    factor = args.tokens / config.max_position_embeddings
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = args.tokens
    model = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=torch.bfloat16)
    return model.to(args.device)


def rows_of(path: Path, args: argparse.Namespace) -> np.ndarray:
    """Token rows ``[rows, tokens]`` int64 of an .npy, or of an .npz with ``rows``."""
    rows = np.load(path)
    rows = rows if path.suffix == ".npy" else rows["rows"]
    return rows[:, : args.tokens].astype(np.int64)


def train(name: str, model, rows, args) -> tuple[LeMoPredictor, dict]:
    """The predictor of one of `TRAININGS`, and a row with its sizes."""
    epochs, settings = TRAININGS[name]
    how = PredictorTraining(
        epochs=epochs, batch_size=args.batch_size, learning_rate=5e-3, **settings
    )
    start = time.perf_counter()
    predictor = train_predictor(model, rows, how)
    units = [layer.units for layer in predictor.attention]
    return predictor, {
        "part": "training",
        "training": name,
        "epochs": epochs,
        "seconds": round(time.perf_counter() - start, 1),
        "units": units,
        "parameters": [sum(p.numel() for p in layer.parameters()) for layer in predictor.attention],
        "share_pruned": round(1 - sum(units) / (how.units * len(units)), 4),
    }


def measured(table: list[dict], training: str, model: str = "base") -> list[dict]:
    """Rows of a recall table, rounded."""
    rows = []
    for row in table:
        numbers = {name: round(row[name], 4) for name in ("mean", "least")}
        numbers["layers"] = [None if x is None else round(x, 4) for x in row["layers"]]
        rows.append({"part": "recall", "training": training, "model": model, **row, **numbers})
    return rows


def fine_tuned(model, predictor: LeMoPredictor, rows, args) -> nn.Module:
    """The model after LoRA fine-tuning with LeMo by ``predictor``."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    settings = TrainingArguments(
        output_dir=args.output.parent / "trainer",
        max_steps=args.lora_steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        bf16=args.device.type == "cuda",
        use_cpu=args.device.type == "cpu",
        save_strategy="no",
        report_to="none",
        logging_steps=20,
    )
    config = LeMoConfig(policy="predictor", agree_across_layers=False)
    lemo = apply_lemo(lora, config, predictor)
    data = [{"input_ids": row, "labels": row} for row in rows]
    print(lemo.describe())
    LeMoTrainer(model=lora, args=settings, train_dataset=data).train()
    remove_lemo(lora)
    return lora.merge_and_unload()


@torch.no_grad()
def cost(args: argparse.Namespace) -> list[dict]:
    """Time of one layer's scores by its predictor, through the policy that training uses."""
    from lemo_hf.families import family_of
    from lemo_hf.policies import POLICIES, ScoreInputs
    from lemo_hf.predictors.block_predictor import BlockPredictor
    from lemo_hf.step import Step

    hidden, tokens = COST["hidden_size"], COST["tokens"]
    dtype = torch.bfloat16
    layer = nn.Module()
    layer.input_layernorm = nn.RMSNorm(hidden, device=args.device, dtype=dtype)
    x = torch.randn(1, tokens, hidden, device=args.device, dtype=dtype)
    rows = []
    for units in (128, 64, 32):
        predictor = BlockPredictor(hidden, 64, units=units).to(args.device, dtype)
        step = Step(LeMoConfig(policy="predictor"), (1, tokens), args.device)
        inputs = ScoreInputs(layer, family_of("llama"), 0, "attention", x, None, step, predictor)
        times = []
        for _ in range(30):
            times.append(
                measure(lambda i=inputs: POLICIES["predictor"](i).sum(), args.device)["ms"]
            )
        rows.append(
            {
                "part": "cost",
                **COST,
                "units": units,
                "parameters": sum(p.numel() for p in predictor.parameters()),
                "ms_median": round(statistics.median(times[10:]), 4),
                "ms_min": round(min(times), 4),
                "ms_max": round(max(times[10:]), 4),
            }
        )
    return rows


def main() -> None:
    """Run the parts in order; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", action="append", required=True, help="name=file.npy")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lora-steps", type=int, default=120)
    parser.add_argument("--trainings", nargs="*", default=list(TRAININGS), choices=list(TRAININGS))
    parser.add_argument("--train-rows", type=int)
    parser.add_argument("--compare-rows", type=int, default=16, help="test rows of the comparisons")
    parser.add_argument("--save", type=Path, help="directory for the first predictor")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = {
        "commit": args.commit,
        **environment(args.device),
        "command": command_line("bench_predictor.py", sys.argv[1:]),
        "tokens": args.tokens,
    }
    rows: list[dict] = cost(args) if args.device.type == "cuda" else []
    data = rows_of(args.train, args)[: args.train_rows]
    tests = {t.split("=")[0]: rows_of(Path(t.split("=")[1]), args) for t in args.test}
    fewer = {name: test[: args.compare_rows] for name, test in tests.items()}
    model = load(args)
    first = None
    for name in args.trainings:
        predictor, row = train(name, model, data, args)
        rows.append(row)
        reported = name in list(TRAININGS)[:2]
        table = recall_table(
            model,
            predictor,
            tests if reported else fewer,
            baselines=BASELINES if reported else (),
        )
        rows += measured(table, name)
        if first is None:
            first = predictor
            if args.save:
                predictor.save_pretrained(args.save)
        save(args.output, header, rows)
        for line in table:
            if line["policy"] == "predictor":
                print(
                    name, line["documents"], line["head"], line["retention"], f"{line['mean']:.3f}"
                )
    tuned = fine_tuned(model, first, data, args)
    table = recall_table(tuned, first, tests, baselines=("position",))
    rows += measured(table, args.trainings[0], model=f"after {args.lora_steps} LoRA steps")
    save(args.output, header, rows)
    for line in table:
        print(
            "drift",
            line["documents"],
            line["head"],
            line["retention"],
            line["policy"],
            line["mean"],
        )


if __name__ == "__main__":
    main()
