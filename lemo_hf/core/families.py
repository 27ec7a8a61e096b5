"""The parts of a decoder layer in each model family: one row a family.

To add a family, add a row. `tests/core/test_families.py` finds it by itself and checks that at
retention 1 the loss and every gradient are the stock model's.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lemo_hf.core.family import GRANITE_MOE, OLMO_2, Family, with_experts
from lemo_hf.core.hybrids import HYBRIDS, granite_4
from lemo_hf.core.unsupported import why_not

_LLAMA = Family()
_MOE = with_experts(Family())
_GEMMA = Family(norm="rms_plus_one", logits_softcap="final_logit_softcapping")
_GEMMA_2 = replace(
    _GEMMA,
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
_GEMMA_4 = replace(
    _GEMMA_2,
    norm="rms",
    half_rotary=False,  # queries and keys turn one after the other
    own_attention=True,
    layer_input=("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"),
    layer_scale="layer_scalar",
)
_GRANITE = Family(residual_scale="residual_multiplier", logits_divisor="logits_scaling")
_GLM = Family(gate=("gate_up_proj",), activation="activation_fn", half_rotary=False)
_COHERE = Family(
    norm="layer",
    mlp_norm="input_layernorm",
    parallel=True,
    half_rotary=False,
    logits_factor="logit_scale",
)
_UP_DOWN = Family(gate=())  # an MLP without a gate
_GPT_2 = Family(
    layers="transformer.h",
    attention="attn",
    attention_output="c_proj",
    attention_norm="ln_1",
    norm="layer",
    gate=(),
    mlp_norm="ln_2",
    intermediate="mlp.c_proj",
    final_norm="transformer.ln_f",
)
_GPT_J = replace(
    _GPT_2,
    attention_output="out_proj",
    mlp_norm="ln_1",
    intermediate="mlp.fc_out",
    parallel=True,
    reads_positions=True,
    own_attention=True,
    returns_tuple=True,
)
_FALCON = replace(
    _GPT_2,
    attention="self_attention",
    attention_output="dense",
    attention_norm="input_layernorm",
    mlp_norm="input_layernorm",
    intermediate="mlp.dense_4h_to_h",
    parallel=True,
    own_attention=True,
    returns_tuple=True,
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": Family(reads_positions=True),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "seed_oss": Family(gate=()),  # a dropout stands behind the MLP's last linear, inside it
    "hunyuan_v1_dense": _LLAMA,
    "cwm": _LLAMA,
    "diffllama": _LLAMA,
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "youtu": Family(half_rotary=False),
    "bitnet": _UP_DOWN,  # a norm stands before the MLP's last linear
    "arcee": _UP_DOWN,
    "helium": Family(half_rotary=False),
    "ernie4_5": Family(half_rotary=False),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "dots1", "minimax_m2"), _MOE
    ),
    "ernie4_5_moe": replace(_MOE, half_rotary=False),
    "deepseek_v3": replace(_MOE, half_rotary=False),
    "glm4_moe_lite": replace(_MOE, half_rotary=False),
    "phimoe": replace(_MOE, norm="layer", router="router"),
    "granitemoe": GRANITE_MOE,
    # cos and sin are half as wide as a head
    "gpt_oss": replace(_MOE, router="router", half_rotary=False, mlp_returns_tuple=True),
    "gemma": replace(_GEMMA, logits_softcap=None),
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "gemma4_text": _GEMMA_4,
    "vaultgemma": replace(_GEMMA, mlp_norm="pre_feedforward_layernorm"),
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "hyperclovax": Family(
        attention_output_norm="post_norm1",
        mlp_output_norm="post_norm2",
        residual_scale="residual_multiplier",
        logits_factor="logits_scaling",
    ),
    "glm": _GLM,
    "glm4": replace(
        _GLM, attention_output_norm="post_self_attn_layernorm", mlp_output_norm="post_mlp_layernorm"
    ),
    "olmo": Family(norm="own"),  # without a weight
    "olmo2": OLMO_2,
    "olmo3": OLMO_2,
    "exaone4": OLMO_2,
    "apertus": replace(
        _UP_DOWN, attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"
    ),
    "nanochat": replace(
        _UP_DOWN,
        norm="own",  # without a weight
        intermediate="mlp.fc2",
        half_rotary=False,  # it turns the other way round
        logits_softcap="final_logit_softcapping",
    ),
    "jais2": replace(_UP_DOWN, norm="layer"),
    "nemotron": replace(_UP_DOWN, norm="own"),
    "starcoder2": replace(_UP_DOWN, norm="layer", intermediate="mlp.c_proj"),
    "phi3": Family(
        attention_dropout="resid_attn_dropout",
        gate=("gate_up_proj",),
        activation="activation_fn",
        mlp_dropout="resid_mlp_dropout",
    ),
    "opt": Family(
        layers="model.decoder.layers",
        attention_output="out_proj",
        attention_norm="self_attn_layer_norm",
        attention_dropout="dropout",
        norm="layer",
        mlp=("fc1", "activation_fn", "fc2"),
        gate=(),
        mlp_norm="final_layer_norm",
        mlp_dropout="dropout",
        intermediate="fc2",
        final_norm="model.decoder.final_layer_norm",
        pre_norm_flag="do_layer_norm_before",
    ),
    "gpt2": _GPT_2,
    "gpt_bigcode": _GPT_2,
    "bloom": replace(
        _FALCON,
        mlp_norm="post_attention_layernorm",
        parallel=False,
        adds_residual=True,
    ),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "gptj": _GPT_J,
    "codegen": _GPT_J,
    "falcon": _FALCON,
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        attention="attention",
        attention_output="dense",
        attention_dropout="post_attention_dropout",
        norm="layer",
        gate=(),
        mlp_dropout="post_mlp_dropout",
        intermediate="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "phi": Family(
        attention_output="dense",
        attention_dropout="resid_dropout",
        norm="layer",
        gate=(),
        mlp_norm="input_layernorm",
        mlp_dropout="resid_dropout",
        intermediate="mlp.fc2",
        final_norm="model.final_layernorm",
        parallel=True,
    ),
    "stablelm": Family(norm="layer", mlp_dropout="dropout"),
    "persimmon": Family(
        attention_output="dense",
        norm="layer",
        gate=(),
        mlp_dropout="dropout",
        intermediate="mlp.dense_4h_to_h",
        final_norm="model.final_layernorm",
    ),
    **HYBRIDS,
}


# Whose language model is one of the above, by the type of its own config: (here, there).
_TEXT_TYPES = {"qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
MULTIMODAL = (
    "gemma3",
    "llava",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "gemma4",
)


def _falcon(row: Family, config: Any) -> Family:
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1:
        row = replace(row, attention_norm="ln_attn", mlp_norm="ln_mlp")
    elif not (config.new_decoder_architecture or config.parallel_attn):
        return replace(
            row,
            attention_dropout="attention_dropout",
            mlp_norm="post_attention_layernorm",
            mlp_dropout="hidden_dropout",
            parallel=False,
        )
    if config.hidden_dropout:
        raise ValueError(
            f"hidden_dropout={config.hidden_dropout} of Falcon applies dropout to the sum of "
            "attention and MLP, which LeMo cannot do: set model.config.hidden_dropout=0 before "
            "the model is made."
        )
    return row


def _stablelm(row: Family, config: Any) -> Family:
    if config.use_parallel_residual:
        return replace(row, mlp_norm="input_layernorm", parallel=True)
    return row


def _bloom(row: Family, config: Any) -> Family:
    if config.apply_residual_connection_post_layernorm:
        raise ValueError(
            "apply_residual_connection_post_layernorm=True is not supported: BLOOM then adds "
            "updates to the normed stream, which tokens that are left out do not have."
        )
    return row


def _gemma_4(row: Family, config: Any) -> Family:
    if config.enable_moe_block:
        raise ValueError(
            "enable_moe_block=True is not supported: Gemma 4's experts stand beside its MLP, with "
            "norms of their own. Use one of its dense sizes."
        )
    return replace(row, shares_keys=config.num_kv_shared_layers > 0)


# What depends on the model's config besides its type.
_BY_CONFIG: dict[str, Callable[[Family, Any], Family]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma4_text": _gemma_4,
    "granitemoehybrid": granite_4,
    "gpt_neox": lambda row, config: replace(row, parallel=config.use_parallel_residual),
    "stablelm": _stablelm,
}


def family_of(config: Any) -> Family:
    """The row of a model's ``config``.

    Raises:
        ValueError: The family is not supported; the message says why, or how to add a row.
    """
    name = config.model_type
    if name in MULTIMODAL:
        return _inside(family_of(config.get_text_config()))
    name = _TEXT_TYPES.get(name, name)
    if name not in FAMILIES:
        why = why_not(name) or (
            "lemo_hf/core/families.py has no row for it; if its layers fit, add one"
        )
        raise ValueError(
            f"model_type {name!r} is not supported: {why}. "
            f"Supported: {', '.join((*FAMILIES, *MULTIMODAL))}."
        )
    row = FAMILIES[name]
    return _BY_CONFIG[name](row, config) if name in _BY_CONFIG else row


def _inside(row: Family) -> Family:
    """``row`` for a language model inside a multimodal one, whose head does not scale logits."""
    return replace(
        row,
        layers="model.language_model." + row.layers.partition(".")[2],
        final_norm="model.language_model." + row.final_norm.partition(".")[2],
        logits_divisor=None,
        logits_factor=None,
        logits_softcap=None,
    )
