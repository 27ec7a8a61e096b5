"""One job: the base model extended to a longer context, trained, and evaluated dense."""

import statistics
import time
from contextlib import ExitStack, nullcontext
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.quality.data import Data
from benchmarks.quality.job import Job
from benchmarks.quality.kinds import nested_sets, s2_attention, subset_gradients
from lemo_hf import LeMoConfig, LeMoTrainer, remove_lemo
from lemo_hf.eval.perplexity import perplexity
from lemo_hf.eval.retrieval import MEASURES, retrieval

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WARM_UP = 4  # steps that the median leaves out: kernels are compiled, allocations settle
QUARTERS = 4  # perplexity of the last one is reported by itself


def load_model(job: Job, base: Path, tokens: int, device: torch.device) -> nn.Module:
    """The base model with linear RoPE scaling to ``tokens``, and fresh LoRA or fp32 weights."""
    config = AutoConfig.from_pretrained(base)
    factor = max(1.0, tokens / config.max_position_embeddings)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = tokens
    dtype = torch.float32 if job.adapter is None or device.type == "cpu" else torch.bfloat16
    torch.manual_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(
        base, config=config, dtype=dtype, attn_implementation="sdpa"
    )
    if job.adapter is not None:
        targets = ATTENTION if job.adapter == "attention" else job.adapter
        lora = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules=targets)
        model = get_peft_model(model, lora)
    return model.to(device)


class StepTimes(TrainerCallback):
    """When optimizer steps end, by CUDA events, for which nothing waits."""

    def __init__(self, device: torch.device):
        self.device, self.ends = device, []

    def on_step_end(self, *args, **kwargs) -> None:
        """Note the time."""
        if self.device.type != "cuda":
            self.ends.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.ends.append(event)

    def median_ms(self) -> float | None:
        """From the end of a step to the end of the next; None if there were not two steps."""
        ends = self.ends[min(WARM_UP, len(self.ends) // 2) :]
        if len(ends) < 2:
            return None
        if self.device.type == "cuda":
            times = [a.elapsed_time(b) for a, b in pairwise(ends)]
        else:
            times = [1e3 * (b - a) for a, b in pairwise(ends)]
        return round(statistics.median(times), 2)


def train(job: Job, model: nn.Module, data: Data, device: torch.device) -> dict:
    """Train in place; what it took: seconds, ms a step, GiB, retention, losses."""
    on_gpu = device.type == "cuda"
    times = StepTimes(device)
    config = None if job.lemo is None else LeMoConfig(seed=job.seed, **job.lemo)
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=job.steps,
            per_device_train_batch_size=job.batch,
            learning_rate=job.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, job.steps // 10),
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            seed=job.seed,
            logging_steps=max(1, job.steps // 12),
            logging_nan_inf_filter=False,  # it waits for the device in each step
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = LeMoTrainer(
            model=model,
            args=settings,
            train_dataset=data.train[job.data],
            lemo_config=None if job.kind == "subset-gradient" else config,
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        if job.kind == "s2attn":
            stack.enter_context(s2_attention(model))
        elif job.kind == "nested":
            stack.enter_context(nested_sets())
        elif job.kind == "subset-gradient":
            stack.enter_context(subset_gradients(model, config))
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.train()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        remove_lemo(model)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    kept = {
        name: [log[f"lemo/{name}"] for log in logs if f"lemo/{name}" in log]
        for name in ("attention_retention", "mlp_retention")
    }
    return {
        "train_seconds": round(seconds, 2),
        "step_ms": times.median_ms(),
        "peak_gib": None if peak is None else round(peak, 3),
        **{name: round(sum(x) / len(x), 4) if x else 1.0 for name, x in kept.items()},
        "losses": [[log["step"], round(log["loss"], 4)] for log in logs],
    }


def evaluate(model: nn.Module, data: Data, digits: int, device: torch.device) -> dict:
    """Dense perplexity by kind of text, whole and in the last quarter, and retrieval by length."""
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    whole, late = {}, {}
    with autocast:
        for name, rows in data.test.items():
            found = perplexity(
                model,
                list(rows),
                max_length=data.tokens,
                stride=data.tokens,
                batch_size=8,
                buckets=QUARTERS,
                progress=False,
            )
            whole[name] = round(found.perplexity, 4)
            late[name] = round(found.by_position[-1]["perplexity"], 4)
        answers = retrieval(model, data.needles[digits], batch_size=8, progress=False)
    return {
        "perplexity": whole,
        "late_perplexity": late,
        "retrieval": {
            measure: {
                str(length): round(answers.mean(measure, length=length), 4)
                for length in answers.lengths
            }
            for measure in MEASURES
        },
        "retrieval_by_depth": {
            str(depth): round(answers.mean(depth=depth, length=answers.lengths[-1]), 4)
            for depth in answers.depths
        },
    }


def run_job(job: Job, base: Path, data: Data, device: torch.device) -> dict:
    """The job's fields and its results."""
    start = time.perf_counter()
    model = load_model(job, base, data.tokens, device)
    row = {**job.to_dict(), "status": "ok"}
    if job.steps:
        row |= train(job, model, data, device)
    if job.evaluate:
        begin = time.perf_counter()
        row |= evaluate(model, data, data.digits[job.data], device)
        row["eval_seconds"] = round(time.perf_counter() - begin, 2)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row
