"""Where each model family keeps the parts of a decoder layer: one row a family.

To add a family, add a row. `tests/core/test_families.py` takes it up by itself and checks that at
retention 1 the loss and every gradient are the stock model's.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Attribute names of a pre-norm decoder layer; the defaults are Llama's.

    ``attention_output`` names the last projection inside ``attention``.
    ``mlp`` is one module or a chain of modules; ``gate`` names the projections of a gated one (gate
    and up, or both fused; none for others), and ``activation`` its activation. ``norm`` is the kind
    of all norms, as `lemo_hf.kernels.norm.KINDS` names it. ``intermediate`` names the Linear
    whose input is the MLP's intermediate activation, None where experts have no single one.
    ``final_norm`` is what the stream goes through before the head, if nothing else is.
    ``pre_norm_flag`` names an attribute which, when False, moves both norms behind the residual
    addition.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_output: str = "o_proj"
    attention_norm: str | None = "input_layernorm"
    attention_output_norm: str | None = None
    attention_dropout: str | None = None
    norm: str = "rms"
    mlp: tuple[str, ...] = ("mlp",)
    gate: tuple[str, ...] = ("gate_proj", "up_proj")
    activation: str = "act_fn"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    mlp_dropout: str | None = None
    intermediate: str | None = "mlp.down_proj"
    final_norm: str = "model.norm"
    pre_norm_flag: str | None = None
    residual_scale: str | None = None
    logits_divisor: str | None = None  # in the model's config
    logits_softcap: str | None = None  # in the model's config


_LLAMA = Family()
_MOE = Family(intermediate=None, gate=())
_GEMMA = Family(
    norm="rms_plus_one",
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    logits_softcap="final_logit_softcapping",
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "mixtral": _MOE,
    "qwen3_moe": _MOE,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": Family(residual_scale="residual_multiplier", logits_divisor="logits_scaling"),
    "olmo2": Family(
        attention_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_output_norm="post_feedforward_layernorm",
    ),
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
}

# Attention and MLP read the same normed input here: a token's MLP cannot wait for its attention.
PARALLEL_RESIDUAL = ("gpt_neox", "gptj", "cohere", "cohere2", "falcon", "phi", "codegen")


def family_of(model_type: str) -> Family:
    """The row of ``config.model_type``.

    Raises:
        ValueError: There is none; the message says what works and how to add a row.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    why = (
        "its attention and MLP run in parallel on one residual, which LeMo does not cover"
        if model_type in PARALLEL_RESIDUAL
        else "lemo_hf/core/families.py has no row for it; if its layers fit, add one"
    )
    raise ValueError(
        f"model_type {model_type!r} is not supported: {why}. Supported: {', '.join(FAMILIES)}."
    )
