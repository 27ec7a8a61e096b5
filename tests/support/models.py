"""Tiny random models of every supported family, and what tests measure on them."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXTRA = {
    "mistral": {"sliding_window": 24},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "opt": {
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "do_layer_norm_before": True,
        "layerdrop": 0.0,
    },
}


def make_model(model_type: str, implementation: str = "eager", **overrides) -> nn.Module:
    """A tiny fp32 model in training mode, its weights far from a near-zero initialisation."""
    settings = {**SIZES, **EXTRA.get(model_type, {}), **overrides}
    config = AutoConfig.for_model(model_type, **settings)
    config._attn_implementation = implementation
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in name:
                parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2)
    return model.train()


def with_lora(model: nn.Module, **options) -> nn.Module:
    """LoRA on every linear, with a B that is not zero, so that every gradient is tested."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.train()


def batch(rows: int = 2, tokens: int = 70, vocabulary: int = 97) -> dict[str, torch.Tensor]:
    """Random ids with labels on every token; the length is no multiple of any block size used."""
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids.clone()}


def loss_and_gradients(model: nn.Module, **inputs) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of one pass, and the gradient of every trainable parameter, by name."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return loss.item(), gradients


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    scale = expected.double().norm()
    return float((actual.double() - expected.double()).norm() / scale.clamp_min(1e-30))
