"""The memory plan of a training step: its peak, part by part, from a model's config alone.

Nothing is loaded or run. Each number is the size of tensors that the training path allocates, and
the peak is taken over the moments of a step at which most of them can be alive.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lemo_hf.config import LeMoConfig
from lemo_hf.memory.offload import GIB
from lemo_hf.planning.layer import BYTES, Trained
from lemo_hf.planning.model import MEASURE, ModelShapes
from lemo_hf.planning.step import PlannedStep


@dataclass(frozen=True)
class Plan:
    """The predicted peak of ``torch.cuda.max_memory_allocated`` in one optimizer step.

    A card needs more: its CUDA context (about half a GiB), and what the allocator holds but cannot
    use (``benchmarks/results``: 2 to 20 % of the peak). Tensors count as large as they are;
    the allocator may add up to 1 MiB to each, since it splits off no less (there: 0.4 % in all).

    Attributes:
        parts: Bytes of each part at the moment of the peak.
        phase: That moment.
        phases: Bytes at the highest moment of each phase.
        levels: What each layer computes again, `LEVELS`; empty for the stock model.
        pinned: Bytes of pinned host memory.
    """

    parts: dict[str, int]
    phase: str
    phases: dict[str, int]
    levels: tuple[str, ...]
    pinned: int

    @property
    def peak(self) -> int:
        """Bytes, the sum of the parts."""
        return sum(self.parts.values())

    def fits(self, gib: float) -> bool:
        """Whether the peak is at most ``gib`` GiB."""
        return self.peak <= gib * GIB


def plan(
    model_config: Any,
    lemo_config: LeMoConfig | None,
    tokens: int,
    *,
    batch_size: int = 1,
    lora_rank: int | None = 8,
    lora_targets: Sequence[str] | str | None = None,
    dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
    autocast: bool = True,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    kbit_training: bool = True,
    gradient_checkpointing: bool = False,
    stock_offload: bool = False,
    memory_gib: float | None = None,
    reserve_gib: float = 0.0,
    finish: bool = False,
) -> Plan:
    """Predict the peak memory of a training step on one GPU: a sparse one, or one of the finish.

    It is that of rows without padding and with a label on each token, attention by ``sdpa`` or
    ``flash_attention_2``, LoRA without dropout, and fused AdamW.

    Args:
        model_config: Of a transformers causal LM.
        lemo_config: What LeMo leaves out; None is the stock model.
        tokens: Length of a row.
        batch_size: Rows.
        lora_rank: Rank of PEFT's LoRA; None trains all parameters.
        lora_targets: Names of the adapted linears, or ``"all-linear"``; None: attention's.
        dtype: Of the weights: "bfloat16", "float16" or "float32".
        adapter_dtype: Of the adapters. PEFT makes them fp32 unless it is told
            ``autocast_adapter_dtype=False``. Its linears then keep a copy of each input, those of
            LeMo's layers only without autocast.
        autocast: As ``TrainingArguments(bf16=True)`` sets it: those copies are 16-bit.
        load_in_4bit: bitsandbytes has quantised the layers' linears: NF4 with double quantisation,
            which computes in ``dtype``.
        load_in_8bit: It has by LLM.int8.
        kbit_training: Then PEFT's ``prepare_model_for_kbit_training`` has made embeddings, head
            and norms fp32, and with them the stream.
        gradient_checkpointing: Of the model.
        stock_offload: It is transformers' with ``offload=True``; the config's ``offload_gib`` comes
            first.
        memory_gib: Of the card: where the config leaves ``recompute`` to gradient checkpointing,
            free memory decides between ``"selective"`` and ``"full"``. None: there is enough.
        reserve_gib: What of it is not free to PyTorch.
        finish: It is a step of the finish, where rows keep ``finish_retention``.

    Raises:
        ValueError: A value is wrong, or is one whose memory is not predicted.

    Source: the code that runs: transformers' layers, PEFT's ``Linear``, this package's kernels, and
    PyTorch's formulas of their backwards.
    """
    for name, value in (("tokens", tokens), ("batch_size", batch_size), ("lora_rank", lora_rank)):
        if not (name == "lora_rank" and value is None) and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    for name, kind in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
        if kind not in BYTES:
            raise ValueError(f"{name} must be one of {', '.join(BYTES)}, got {kind!r}.")
    if finish and lemo_config is None:
        raise ValueError("finish=True without a lemo_config: the stock model has no finish.")
    if autocast and dtype == "float32":
        raise ValueError(
            "autocast of float32 weights is not predicted: load them in bfloat16, or set "
            "autocast=False."
        )
    bits = _bits(load_in_4bit, load_in_8bit, lora_rank, dtype)
    model = ModelShapes.of(model_config)
    if model.window is not None and model.window < tokens:
        raise ValueError(
            f"the config's sliding_window={model.window} is shorter than {tokens} tokens: masks of "
            "tokens x tokens are not predicted. Plan for rows of at most "
            f"{model.window} tokens, or {MEASURE}"
        )
    trained = Trained.of(
        model, lora_rank, lora_targets, dtype, adapter_dtype, autocast, bits, kbit_training
    )
    room = None if memory_gib is None else (memory_gib - reserve_gib) * GIB
    step = PlannedStep(
        model,
        trained,
        lemo_config,
        batch_size,
        tokens,
        gradient_checkpointing,
        stock_offload,
        room,
        finish,
    )
    highest: dict[str, dict[str, int]] = {}
    for phase, parts in step.moments():
        if sum(parts.values()) > sum(highest.get(phase, {}).values()):
            highest[phase] = {name: size for name, size in parts.items() if size}
    phases = {phase: sum(parts.values()) for phase, parts in highest.items()}
    peak = max(phases, key=lambda phase: phases[phase])
    levels = () if lemo_config is None else tuple(step.levels)
    return Plan(highest[peak], peak, phases, levels, step.offload.pinned)


def _bits(four: bool, eight: bool, lora_rank: int | None, dtype: str) -> int | None:
    """Of a quantised weight."""
    if not (four or eight):
        return None
    if four and eight:
        raise ValueError("load_in_4bit and load_in_8bit exclude each other: give one of them.")
    if lora_rank is None:
        raise ValueError("quantised weights cannot be trained: give a lora_rank.")
    if dtype == "float32":
        raise ValueError(
            "dtype='float32' of quantised weights is not predicted: give what they compute in, "
            "'bfloat16' or 'float16'."
        )
    return 4 if four else 8


def plans(
    model_config: Any, lemo_config: LeMoConfig, tokens: int, **settings: Any
) -> dict[str, Plan]:
    """The plan of each phase of a run that has steps: of ``"sparse"`` and of ``"finish"``.

    Under policy ``"auto"`` without a ``dense_finish`` only rows that are labelled throughout, as
    those of the plan are, have a finish.

    Args:
        model_config: As for `plan`.
        lemo_config: What LeMo leaves out, and when.
        tokens: Length of a row.
        **settings: Keyword arguments of `plan`.

    Raises:
        ValueError: As for `plan`.
    """
    phases = {"sparse": lemo_config.finish < 1, "finish": lemo_config.finish > 0}
    return {
        name: plan(model_config, lemo_config, tokens, finish=name == "finish", **settings)
        for name, there in phases.items()
        if there
    }


def fitting_finish(
    model_config: Any,
    lemo_config: LeMoConfig,
    tokens: int,
    memory_gib: float,
    *,
    reserve_gib: float = 0.0,
    **settings: Any,
) -> float | None:
    """The highest ``finish_retention``, in hundredths, whose finish fits; None if none does.

    Args:
        model_config: As for `plan`.
        lemo_config: As for `plan`, but for its ``finish_retention``.
        tokens: Length of a row.
        memory_gib: Of the card.
        reserve_gib: As for `longest`.
        **settings: Keyword arguments of `plan`.

    Raises:
        ValueError: As for `plan`.
    """
    settings |= {"memory_gib": memory_gib, "reserve_gib": reserve_gib, "finish": True}
    for percent in range(100, 0, -1):
        config = replace(lemo_config, finish_retention=percent / 100)
        if plan(model_config, config, tokens, **settings).fits(memory_gib - reserve_gib):
            return percent / 100
    return None


def longest(
    model_config: Any,
    lemo_config: LeMoConfig | None,
    memory_gib: float,
    *,
    reserve_gib: float = 0.0,
    **settings: Any,
) -> int:
    """The longest row that fits: both phases of a run, if it has two (see `plans`).

    Args:
        model_config: As for `plan`; its ``max_position_embeddings`` is no limit.
        lemo_config: As for `plan`.
        memory_gib: Of the card.
        reserve_gib: What of it the plan must leave free: see `Plan` for what else needs memory.
        **settings: Keyword arguments of `plan` but ``finish``.

    Returns:
        Tokens, a multiple of the block size (of 64 without LeMo), no longer than a sliding window;
        0 if not even one block fits.

    Raises:
        ValueError: The memory is no number, or as for `plan`.
    """
    room = memory_gib - reserve_gib
    settings |= {"memory_gib": memory_gib, "reserve_gib": reserve_gib}
    if not math.isfinite(room):
        raise ValueError(f"memory_gib={memory_gib} and reserve_gib={reserve_gib} must be finite.")
    size = 64 if lemo_config is None else lemo_config.block_size
    window = ModelShapes.of(model_config).window
    most = math.inf if window is None else window // size

    def fits(blocks: int) -> bool:
        if blocks > most:
            return False
        if lemo_config is None:
            return plan(model_config, None, blocks * size, **settings).fits(room)
        found = plans(model_config, lemo_config, blocks * size, **settings)
        return all(phase.fits(room) for phase in found.values())

    low, high = 0, 1  # blocks: low fits, high does not
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * size
