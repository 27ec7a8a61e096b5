"""Rows of families in which some layers pass a state from token to token in place of attention.

`lemo_hf.core.families` has them among its own. Their layers' recurrent modules read kept rows as
one shorter sequence: a contiguous piece is what the stock model makes of that piece, and where
tokens are left out, the state goes from the last token before the gap to the first one behind it.
"""

from dataclasses import replace
from typing import Any

from lemo_hf.core.family import Family


def _state(row: Family, module: str) -> Family:
    """``row`` of layers whose ``module`` stands in attention's place."""
    return replace(
        row,
        attention=module,
        attention_output="out_proj",
        attention_dropout=None,
        own_attention=True,
        carries_state=True,
        recurrent=None,
    )


def _experts(row: Family, router: str = "gate") -> Family:
    """``row`` with experts for an MLP."""
    return replace(row, intermediate=None, gate=(), router=router)


def _hybrid(row: Family, module: str) -> Family:
    return replace(row, recurrent=_state(row, module))


_QWEN = Family(norm="rms_plus_one", half_rotary=False)  # a quarter of a head turns
_LFM_2 = Family(
    attention_output="out_proj",
    attention_norm="operator_norm",
    mlp=("feed_forward",),
    gate=(),  # its activation is a function, not a module
    mlp_norm="ffn_norm",
    intermediate="feed_forward.w2",
    final_norm="model.embedding_norm",
)
_GRANITE_4 = Family(
    mlp=("block_sparse_moe",),
    gate=(),
    router="router",
    intermediate=None,
    mlp_beside="shared_mlp",
    residual_scale="residual_multiplier",
    logits_divisor="logits_scaling",
)
_BAMBA = Family(
    mlp=("feed_forward",),
    mlp_norm="pre_ff_layernorm",
    intermediate="feed_forward.down_proj",
    final_norm="model.final_layernorm",
)
_OLMO_HYBRID = Family(
    attention_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
)

HYBRIDS = {
    "qwen3_next": _hybrid(_experts(_QWEN), "linear_attn"),
    "qwen3_5_text": _hybrid(_QWEN, "linear_attn"),
    "qwen3_5_moe_text": _hybrid(_experts(_QWEN), "linear_attn"),
    # Layers with linear attention have their norms before it, those with attention behind it.
    "olmo_hybrid": replace(_OLMO_HYBRID, recurrent=_state(Family(), "linear_attn")),
    "lfm2": _hybrid(_LFM_2, "conv"),
    "lfm2_moe": _hybrid(_experts(_LFM_2), "conv"),
    "granitemoehybrid": _hybrid(_GRANITE_4, "mamba"),
    "bamba": _hybrid(replace(_BAMBA, half_rotary=False, returns_tuple=True), "mamba"),
    "jamba": _hybrid(_experts(_BAMBA, "router"), "mamba"),
}


def granite_4(row: Family, config: Any) -> Family:
    """The row of a Granite 4 by its ``config``: small ones have no experts, but one MLP."""
    if config.num_local_experts:
        return row
    row = replace(
        row,
        mlp=("shared_mlp",),
        mlp_beside=None,
        gate=("input_linear",),
        activation="activation",
        router=None,
        intermediate="shared_mlp.output_linear",
    )
    return _hybrid(row, "mamba")
