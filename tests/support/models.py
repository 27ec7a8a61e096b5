"""Tiny random models of every supported family, and what tests measure on them."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
)

from support.paths import MODEL

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
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LINEAR = ["linear_attention", "full_attention"] * 2
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS_OF_QWEN = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
NO_SETTING = object()
GPT = {"n_positions": 512, "n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXTRA = {
    "mistral": {"sliding_window": 24},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "ministral": {**SLIDING},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "seed_oss": {"attention_bias": True, "attention_out_bias": False, "residual_dropout": 0.0},
    "cwm": {**SLIDING},
    "internlm3": {"bias": True, "qkv_bias": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "youtu": {  # latent attention
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
        "pad_token_id": None,  # transformers clears its row, and with it the head's, on loading
    },
    "vaultgemma": {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "granite_swa": {
        **SLIDING,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
    },
    "hyperclovax": {"residual_multiplier": 0.3, "logits_scaling": 0.5, "use_post_norm": True},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "olmo": {"clip_qkv": 4.0},
    "olmo3": {**SLIDING},
    "exaone4": {**SLIDING, "sliding_window_pattern": 2},
    "nanochat": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {**SLIDING, "logit_scale": 0.25},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "bloom": {"hidden_dropout": 0.0},
    "falcon": {"hidden_dropout": 0.0, "multi_query": True, "head_dim": NO_SETTING},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "partial_rotary_factor": 0.5},
    "gpt_neox": {"hidden_dropout": 0.0, "rotary_pct": 0.5},
    "stablelm": {"hidden_dropout": 0.0, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 24},
    "persimmon": {"hidden_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 4.0},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "use_qk_norm": True},
    "dots1": {**EXPERTS, "n_routed_experts": 4, **SLIDING},
    "deepseek_v3": {**EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    "glm4_moe_lite": {**EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "use_bias": True,
    },
    "phimoe": {  # the router draws no expert by chance, so that fp64 routes alike
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.0,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": None,
    },
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
    },
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 24,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 6,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 5.0,
    },
    "qwen3_next": {**DELTA, **EXPERTS_OF_QWEN, "layer_types": LINEAR},
    "qwen3_5_text": {**DELTA, "layer_types": LINEAR},
    "qwen3_5_moe_text": {**DELTA, **EXPERTS_OF_QWEN, "layer_types": LINEAR},
    "olmo_hybrid": {**DELTA, "layer_types": LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": LINEAR,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "opt": {
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "do_layer_norm_before": True,
        "layerdrop": 0.0,
    },
}


# transformers has no other attention for them: soft caps, sinks, and code of their own.
EAGER = ("gemma2", "gpt_oss", "vaultgemma", "granite_swa", "bloom", "gptj", "codegen")
# Layers of a family that its config shapes: the family, and that config.
VARIANTS = {
    "falcon-rw": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False}),
    "falcon-11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma4-shared": (
        "gemma4_text",
        {
            "layer_types": ["full_attention"] * 4,
            "num_kv_shared_layers": 1,
            "attention_k_eq_v": True,
        },
    ),
    "gemma4-31b": ("gemma4_text", {"hidden_size_per_layer_input": 0}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
}


def make_model(model_type: str, implementation: str = "eager", **overrides) -> nn.Module:
    """A tiny fp32 model in training mode, its weights far from a near-zero initialisation.

    Args:
        model_type: As in a config, or one of `VARIANTS`; one that transformers does not have skips
            the test.
        implementation: Of its attention, if the family is none of `EAGER`.
        **overrides: Of its config.
    """
    model_type, variant = VARIANTS.get(model_type, (model_type, {}))
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    settings = {**SIZES, **EXTRA.get(model_type, {}), **variant, **overrides}
    settings = {name: value for name, value in settings.items() if value is not NO_SETTING}
    for by_layer in {"layer_types", "no_rope_layers"} & settings.keys():
        settings[by_layer] = settings[by_layer][: settings["num_hidden_layers"]]
    config = AutoConfig.for_model(model_type, **settings)
    config._attn_implementation = "eager" if model_type in EAGER else implementation
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in name:
                parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma 4's, which begin with 1
                buffer.fill_(0.6)
    return model.train()


def with_lora(model: nn.Module, **options) -> nn.Module:
    """LoRA on every linear, with a B that is not zero, so that every gradient is tested."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    if model.config.model_type == "phimoe":  # its router is a Linear that returns three tensors
        settings["exclude_modules"] = ["router"]
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


def save_tiny(folder, **sizes):
    """A tiny Llama with the demo's words, as a directory that commands take; its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            **sizes,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tokenizer


def same_step(lemo):
    """``lemo``, whose passes draw the same by chance from now on: all are of the first step."""
    lemo.begin_step(0)
    lemo.end_step()
    return lemo
