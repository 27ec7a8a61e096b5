"""Rows for families in which some layers pass a state from token to token instead of attention.

`lemo_hf.core.families` includes them. The recurrent modules of their layers read the kept rows as
one shorter sequence: a contiguous piece gives what the stock model makes of that piece, and at a
gap the state goes from the last token before it to the first token behind it.
"""

from dataclasses import replace
from typing import Any

from lemo_hf.core.family import GRANITE_MOE, OLMO_2, Family, with_experts


def _state(row: Family, module: str) -> Family:
    """``row`` for layers that have ``module`` in place of attention."""
    return replace(
        row,
        attention=module,
        attention_output="out_proj",
        attention_dropout=None,
        own_attention=True,
        carries_state=True,
        recurrent=None,
    )


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
_BAMBA = Family(
    mlp=("feed_forward",),
    mlp_norm="pre_ff_layernorm",
    intermediate="feed_forward.down_proj",
    final_norm="model.final_layernorm",
)
HYBRIDS = {
    "qwen3_next": _hybrid(with_experts(_QWEN), "linear_attn"),
    "qwen3_5_text": _hybrid(_QWEN, "linear_attn"),
    "qwen3_5_moe_text": _hybrid(with_experts(_QWEN), "linear_attn"),
    # Layers with linear attention have their norms before it, those with attention behind it.
    "olmo_hybrid": replace(OLMO_2, recurrent=_state(Family(), "linear_attn")),
    "lfm2": _hybrid(_LFM_2, "conv"),
    "lfm2_moe": _hybrid(with_experts(_LFM_2), "conv"),
    "granitemoehybrid": _hybrid(replace(GRANITE_MOE, mlp_beside="shared_mlp"), "mamba"),
    "bamba": _hybrid(replace(_BAMBA, half_rotary=False, returns_tuple=True), "mamba"),
    "jamba": _hybrid(with_experts(_BAMBA, "router"), "mamba"),
}


def granite_4(row: Family, config: Any) -> Family:
    """The row of a Granite 4 model by its ``config``: small models have one MLP instead of
    experts."""
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
