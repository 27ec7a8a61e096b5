"""Predictors of a real model: how they are best trained, what they recall, and what they cost.

Recall is measured on documents that neither the model nor the predictors were trained on, and again
after the model was fine-tuned with LoRA (drift). Cost (`--only cost`, which needs no model): one
layer's predictor at the sizes of Llama-3 8B, by its kernels and by its modules.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from record import command_line, environment, save
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
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
# Networks whose cost is measured: units, and the type of their weights.
NETWORKS = [(units, torch.bfloat16) for units in (128, 64, 32)] + [(128, torch.float32)]
CALLS = 20  # in a row, of a cost
PARTS = ("cost", "quality")


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
    from peft import LoraConfig, get_peft_model

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


def timed(call: Callable[[], Tensor]) -> dict[str, float]:
    """What one call costs, after it was called before.

    Returns:
        ``ms_median``, ``ms_min`` and ``ms_max`` of calls that find the GPU idle and wait for it, by
        CUDA events; ``ms_queued``, of each of `CALLS` calls that do not wait; ``ms_kernels``, the
        GPU's own time by the profiler, and ``kernels``, how many it ran (None without a profiler).
    """

    def elapsed(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    elapsed(5)
    single = [elapsed(1) for _ in range(CALLS)]
    queued = statistics.median(elapsed(CALLS) for _ in range(5))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        elapsed(CALLS)
    kernels = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in kernels) / CALLS / 1e3
    for name in sorted({e.name for e in kernels}):
        times = [e.time_range.elapsed_us() for e in kernels if e.name == name]
        print(f"    {len(times) / CALLS:.0f} x {statistics.median(times):.1f} us  {name[:90]}")
    return {
        "ms_median": round(statistics.median(single), 4),
        "ms_min": round(min(single), 4),
        "ms_max": round(max(single), 4),
        "ms_queued": round(queued, 4),
        "ms_kernels": round(busy, 4) if kernels else None,
        "kernels": round(len(kernels) / CALLS) if kernels else None,
    }


@torch.no_grad()
def cost(args: argparse.Namespace) -> list[dict]:
    """Time of one layer's scores by its predictor, through the policy that training uses."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from lemo_hf import policies
    from lemo_hf.families import family_of
    from lemo_hf.predictors.block_predictor import BlockPredictor
    from lemo_hf.step import Step

    hidden, tokens = COST["hidden_size"], COST["tokens"]
    on = {"device": args.device, "dtype": torch.bfloat16}
    layer = nn.Module()
    layer.input_layernorm = LlamaRMSNorm(hidden).to(**on)
    x = torch.randn(1, tokens, hidden, **on)
    step = Step(LeMoConfig(policy="predictor"), (1, tokens), args.device)
    family = family_of("llama")
    rows = []
    for units, dtype in NETWORKS:
        network = BlockPredictor(hidden, 64, units=units)
        network.init_weights(torch.Generator().manual_seed(0))
        network.to(args.device, dtype)
        inputs = policies.ScoreInputs(layer, family, 0, "attention", x, None, step, network)
        scores = {}
        for path in ("kernels", "modules"):
            with mock.patch.object(policies, "_by_kernel", lambda *_, p=path, **__: p == "kernels"):
                scores[path] = policies.predictor(inputs)
                times = timed(lambda i=inputs: policies.predictor(i))
            row = {"part": "cost", **COST, "units": units, "weights": str(dtype)[6:], "by": path}
            rows.append(
                {**row, "parameters": sum(p.numel() for p in network.parameters()), **times}
            )
            print(rows[-1], flush=True)
        best = [set(s[0].topk(s.shape[1] // 2).indices.tolist()) for s in scores.values()]
        rows[-2]["same_half"] = round(len(best[0] & best[1]) / len(best[0]), 4)
        print(f"    {rows[-2]['same_half']:.1%} of the best half of the blocks are the same")
    return rows


def main() -> None:
    """Run the parts in order; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument("--model")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", action="append", help="name=file.npy")
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
    if args.only != "cost" and not (args.model and args.train and args.test):
        parser.error("--model, --train and --test are needed, unless --only cost")
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.only == "cost" and args.device.type != "cuda":
        parser.error("--only cost needs a CUDA GPU")
    packages = ("torch", "triton", "transformers", *(() if args.only == "cost" else ("peft",)))
    header = {
        "commit": args.commit,
        **environment(args.device, packages),
        "command": command_line("bench_predictor.py", sys.argv[1:]),
        "tokens": args.tokens,
    }
    measures_cost = args.device.type == "cuda" and args.only != "quality"
    rows: list[dict] = cost(args) if measures_cost else []
    if args.only == "cost":
        save(args.output, header, rows)
        return
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
