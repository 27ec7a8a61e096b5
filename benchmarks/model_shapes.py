"""Models with the shapes of published ones and random weights; speed and memory ask for no more."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from quantized_base import Base, quantize
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
WIDE = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"}
LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
OPT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Shape:
    """One model: its config class, that one's arguments, and where its adapters go."""

    config: type[PreTrainedConfig]
    values: dict
    targets: tuple[str, ...] = tuple(LORA["target_modules"])


SHAPES = {
    "Llama-3 8B": Shape(
        LlamaConfig,
        {
            **LLAMA,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "Llama-2 7B": Shape(
        LlamaConfig,
        {
            **LLAMA,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 32000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "SmolLM2-135M": Shape(
        LlamaConfig,
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    # Dropout 0.1 behind attention and MLP is in the published config.
    "OPT-6.7B": Shape(
        OPTConfig,
        {
            "hidden_size": 4096,
            "word_embed_proj_dim": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "ffn_dim": 16384,
            "vocab_size": 50272,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
        },
        OPT_TARGETS,
    ),
}
_SMALL = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 512}
TINY = {
    "Llama-3 8B": {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 128},
    "Llama-2 7B": {**_SMALL, "num_key_value_heads": 4, "intermediate_size": 96},
    "SmolLM2-135M": {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 128},
    "OPT-6.7B": {**_SMALL, "word_embed_proj_dim": 64, "ffn_dim": 128},
}


def model_config(title: str, longest: int | None = None, tiny: bool = False) -> PreTrainedConfig:
    """The config of a model.

    Args:
        title: A key of `SHAPES`.
        longest: Tokens of the longest sequence; None: the config's own.
        tiny: A model of the same kind that takes no time.
    """
    shape = SHAPES[title]
    values = shape.values | (TINY[title] if tiny else {})
    if longest is not None:
        values = values | {"max_position_embeddings": longest}
    return shape.config(**values, use_cache=False, attn_implementation="sdpa")


def build_model(
    title: str,
    longest: int,
    device: torch.device,
    tiny: bool = False,
    base: Base = Base(),  # noqa: B008 - it is frozen
) -> nn.Module:
    """A PEFT model in training mode with random weights, made on ``device``."""
    config = model_config(title, longest, tiny)
    model = bare_model(config)
    if base.kind is not None:
        model = quantize(model, base, device)
        restore_buffers(model, config, device)
        model = with_adapters(model, title, base)
        if base.kbit_training:  # as Trainer runs it, by accelerate
            model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        return model
    model.to_empty(device=device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1) if weight.dim() == 1 else weight.normal_(0, 0.02)
    model.tie_weights()
    restore_buffers(model, config, device)
    return with_adapters(model, title, base)


def bare_model(config: PreTrainedConfig) -> nn.Module:
    """The causal LM in bf16 on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def restore_buffers(model: nn.Module, config: PreTrainedConfig, device: torch.device) -> None:
    """Give buffers their values. The RoPE frequencies are all there is; they stay fp32."""
    if hasattr(model.model, "rotary_emb"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for name, buffer in model.named_buffers():
        if "rotary_emb" not in name or not buffer.isfinite().all():
            raise RuntimeError(f"the buffer {name} has no values")


def with_adapters(model: nn.Module, title: str, base: Base = Base()) -> nn.Module:  # noqa: B008
    """The PEFT model around ``model``, in training mode."""
    options = WIDE if base.wide else LORA | {"target_modules": list(SHAPES[title].targets)}
    lora = LoraConfig(**options, task_type="CAUSAL_LM")
    # bf16 like the rest: peft's fp32 default would cast and keep every projection's input.
    return get_peft_model(model, lora, autocast_adapter_dtype=base.kbit_training).train()


def adapter_weights(model: nn.Module) -> list[nn.Parameter]:
    """What is trained."""
    return [weight for weight in model.parameters() if weight.requires_grad]
