"""What `bench_scaling.py` measures: cases, their Trainers, and the meter these carry."""

import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from model_shapes import build_model
from providers import LEMO
from record import GIB
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer

MODEL = "Llama-3 8B"
K = 1024


@dataclass(frozen=True)
class Case:
    """Steps of one Trainer.

    Attributes:
        group: Which table of results it belongs to.
        engine: "ddp", "fsdp2", or "sequence": one sequence over all GPUs, adapters by DDP.
        provider: "hf" (plain Trainer) or "lemo".
        tokens: Of a sequence.
        checkpointing: Of transformers.
    """

    group: str
    engine: str
    provider: str
    tokens: int
    checkpointing: bool


def _of(group: str, engines: tuple, providers: tuple, lengths: tuple, checkpointing: bool):
    return [
        Case(group, engine, provider, tokens, checkpointing)
        for tokens in lengths
        for engine in engines
        for provider in providers
    ]


GROUPS = {
    "plain": _of("plain", ("ddp", "fsdp2"), ("hf", "lemo"), (16 * K,), False),
    "checkpointing": _of("checkpointing", ("ddp", "fsdp2"), ("hf", "lemo"), (64 * K,), True),
    "sequence": _of("sequence", ("sequence",), ("lemo",), (64 * K, 256 * K), True),
    "longest": [],  # by dry steps: `longest`
}


class RandomRows(Dataset):
    """Rows of random tokens, labels the same."""

    def __init__(self, tokens: int, vocabulary: int):
        self.tokens, self.vocabulary = tokens, vocabulary

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.vocabulary, (self.tokens,), generator=generator)
        return {"input_ids": ids, "labels": ids}


class Meter(TrainerCallback):
    """Time and peak memory of steps after ``warm_up``; the last one is profiled in their place.

    Attributes:
        samples: One entry a timed step, as `record.measure` returns them.
        nccl_ms: That NCCL's kernels took in the last step; they wait for other GPUs, and most run
            beside computation.
    """

    def __init__(self, device: torch.device, warm_up: int, last: int):
        self.device, self.warm_up, self.last = device, warm_up, last
        self.samples: list[dict[str, float]] = []
        self.nccl_ms: float | None = None
        self._profile = None

    def on_step_begin(self, args, state, control, **kwargs):
        """Begins to measure."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            if state.global_step + 1 == self.last:
                activities = [torch.profiler.ProfilerActivity.CUDA]
                self._profile = torch.profiler.profile(activities=activities)
                self._profile.__enter__()
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Takes the figures of a step."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - self._began)
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            events = self._profile.key_averages()
            nccl = [e.self_device_time_total for e in events if "nccl" in e.key.lower()]
            self.nccl_ms, self._profile = round(sum(nccl) / 1e3, 1), None
        elif state.global_step > self.warm_up:
            peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
            reserved = torch.cuda.max_memory_reserved() / GIB if cuda else 0.0
            sample = {"ms": ms, "peak_gib": peak, "reserved_gib": reserved, "loss": 0.0}
            self.samples.append(sample)


def trainer_of(case: Case, gpus: int, device: torch.device, meter: Meter) -> LeMoTrainer:
    """The Trainer of a case, on a model of its own; a tiny one where ``device`` is a CPU."""
    tiny = device.type == "cpu"
    AcceleratorState._reset_state()  # the last case's
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    options: dict[str, Any] = {}
    if case.engine == "fsdp2":
        options = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    if case.checkpointing:
        options["gradient_checkpointing"] = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=meter.last,
        per_device_train_batch_size=1,
        optim="adamw_torch" if tiny else "adamw_torch_fused",
        learning_rate=1e-4,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=tiny,
        ddp_timeout=180,
        ddp_find_unused_parameters=False,
        **options,
    )
    if case.engine == "fsdp2" and tiny:  # accelerate gives FSDP to processes on GPUs only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    config = None
    if case.provider == "lemo":
        size = gpus if case.engine == "sequence" else 1
        config = LeMoConfig(**LEMO, sequence_parallel_size=size)
    model = build_model(MODEL, case.tokens, device, tiny)
    rows = RandomRows(case.tokens, model.config.vocab_size)
    return LeMoTrainer(model, arguments, train_dataset=rows, lemo_config=config, callbacks=[meter])
