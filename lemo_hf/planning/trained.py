"""What a plan is told of the training: weights, adapters, precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lemo_hf.core.family import Family

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Trained:
    """What is trained, and how.

    Attributes:
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
        labels: Tokens with a label, the last of each row: a completion's. None: all have one.
        triton: The GPU runs Triton's kernels. One older than Ampere (V100, T4) runs PyTorch's
            operators, in fp16, and its attention takes as many key heads as query heads.
        capability: Major compute capability of the GPU, by which PyTorch sizes the workspaces of
            cuBLAS. They are largest on Hopper (9) and later GPUs.

    Raises:
        ValueError: A value is wrong, or is one whose memory is not predicted.
    """

    lora_rank: int | None = 8
    lora_targets: Sequence[str] | str | None = None
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    autocast: bool = True
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    kbit_training: bool = True
    gradient_checkpointing: bool = False
    stock_offload: bool = False
    labels: int | None = None
    triton: bool = True
    capability: int = 9

    def __post_init__(self) -> None:
        if self.lora_rank is not None:
            check_count("lora_rank", self.lora_rank)
        if self.labels is not None:
            check_count("labels", self.labels)
        check_count("capability", self.capability)
        for name, kind in (("dtype", self.dtype), ("adapter_dtype", self.adapter_dtype)):
            if kind not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {kind!r}.")
        if self.autocast and self.dtype == "float32":
            raise ValueError(
                "autocast (bf16 or fp16) of float32 weights is not predicted: load them in "
                "bfloat16, or train without autocast."
            )
        if not self.triton and self.dtype == "bfloat16":
            raise ValueError("a GPU without Triton has no bfloat16 either: give dtype='float16'.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: give one of them.")
        if self.bits and self.lora_rank is None:
            raise ValueError("quantised weights cannot be trained: give a lora_rank.")
        if self.bits and self.dtype == "float32":
            raise ValueError(
                "dtype='float32' of quantised weights is not predicted: give what they compute in, "
                "'bfloat16' or 'float16'."
            )

    @property
    def bits(self) -> int | None:
        """Of a quantised weight."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def targets_in(self, layer: nn.Module, family: Family) -> list[str]:
        """Names of the linears of ``layer`` that are to be adapted."""
        attention = family.attention + "."
        linears = [path for path, x in layer.named_modules() if isinstance(x, nn.Linear)]
        # The output projection, which is made first in some families, is the last of attention's.
        linears.sort(key=lambda path: path == attention + family.attention_output)
        linears.sort(key=lambda path: not path.startswith(attention))
        known = [path.rpartition(".")[2] for path in linears]
        targets = self.lora_targets
        if targets is None:
            return known[: sum(path.startswith(attention) for path in linears)]
        names = [targets] if isinstance(targets, str) else list(targets)
        there = names == ["all-linear"] or (names and set(names) <= set(known))
        if self.lora_rank is not None and not there:
            raise ValueError(
                f"lora_targets={targets!r}: the linears of a layer are {', '.join(known)} "
                "(or 'all-linear'); adapters elsewhere are not predicted."
            )
        return names

    def with_adapters(self, model: Any, targets: list[str]) -> nn.Module:
        """PEFT's model around ``model``, which is on the meta device."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ValueError(
                'LoRA is planned with PEFT\'s own adapters: pip install "lemo-hf[peft]".'
            ) from None

        lora = LoraConfig(
            r=self.lora_rank or 0,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        kind = getattr(torch, self.adapter_dtype)
        for weight in model.parameters():
            if weight.requires_grad:  # on the meta device PEFT leaves them fp32
                weight.data = weight.data.to(kind)
            elif self.bits and self.kbit_training and weight.is_floating_point():
                weight.data = weight.data.float()
        return model


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a positive integer."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def dtype_of(config: Any, usual: str) -> str:
    """The dtype in which transformers loads weights of ``config`` if it is told none: a name of
    `DTYPES`; ``usual`` if the config does not say."""
    said = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return said if said in DTYPES else usual
