"""What a run or a bug report has to say of the machine: versions, GPUs, attention kernels."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from lemo_hf.core.attention import fastest_attention
from lemo_hf.kernels.launch import use_triton
from lemo_hf.version import __version__

PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "datasets", "triton", "safetensors"),
    *("huggingface-hub", "tokenizers", "trl", "bitsandbytes", "flash-attn", "kernels"),
    *("liger-kernel", "deepspeed", "matplotlib"),
)
# Settings that change what runs; none of them is a secret.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("TRITON_INTERPRET", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUBLAS_WORKSPACE_CONFIG"),
)
HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}


def environment() -> dict[str, dict[str, Any]]:
    """Facts by section, as JSON knows them.

    On a GPU PyTorch's attention kernels are tried for heads of Llama-3 8B's shape, which takes
    about a second.
    """
    return {
        "versions": {"lemo-hf": __version__, "python": platform.python_version(), **_packages()},
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        },
        "kernels": {
            "lemo-hf by Triton": torch.cuda.is_available()
            and use_triton(torch.empty(0, device="cuda")),
            "attention, fastest first": _attention(),
        },
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute {gpu.major}.{gpu.minor}"


def _attention() -> list[str]:
    """Backends of scaled_dot_product_attention that run bf16 here; of a CPU they are not told."""
    if not torch.cuda.is_available():
        return []
    from transformers import LlamaConfig

    module: Any = nn.Module()  # as much of an attention module as is asked for
    module.config = LlamaConfig(hidden_size=4096, **HEADS)
    module.config._attn_implementation = "sdpa"
    backends = fastest_attention(module, torch.device("cuda", 0), torch.bfloat16) or ()
    return [backend.name.lower() for backend in backends]
