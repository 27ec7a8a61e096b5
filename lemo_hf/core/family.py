"""Facts about a model family: the names of the parts of its decoder layer."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """Attribute names of a decoder layer; the defaults are Llama's.

    ``attention_output`` names the last projection inside ``attention``. ``mlp`` is one module or a
    chain of modules; ``gate`` names the projections of a gated one (gate and up, or both fused;
    none for others), and ``activation`` its activation. ``norm`` is the kind of all norms, as
    `lemo_hf.kernels.norm.KINDS` names it, or "own": then they are called. ``intermediate`` names
    the Linear whose input is the MLP's intermediate activation; None for experts, which have no
    single one. ``router`` names the router inside an ``mlp`` of experts. ``final_norm`` names the
    norm between the stream and the head, if nothing else is there. ``pre_norm_flag`` names an
    attribute which, when False, moves both norms behind the residual addition. In a ``parallel``
    layer the MLP reads the rows that attention reads, and both updates are added at once; where
    ``mlp_norm`` is ``attention_norm``, it is taken once. ``half_rotary``: if attention rotates, it
    rotates the two halves of a head, as Llama does. ``reads_positions``: attention reads
    ``position_ids``, besides cos and sin. ``own_attention``: LeMo cannot read queries and keys,
    since attention calls no function of transformers' `AttentionInterface`, or takes keys of other
    layers. ``adds_residual``: attention and MLP get the residual and add it themselves.
    ``recurrent`` is the row of layers that have its ``attention`` in place of this row's: a module
    that passes a state from token to token (``carries_state``), such as linear attention, Mamba or
    a convolution. It reads the kept rows as one shorter sequence. ``layer_input`` names gate,
    projection and norm of a third sublayer, which mixes the stream with an input of each token that
    the layer has of its own (Gemma 4), if a layer has that gate. ``layer_scale`` names a factor
    that the layer's stream is multiplied by at its end. ``shares_keys``: some layers read keys and
    values of earlier ones. ``mlp_beside`` names a module that reads the MLP's input, and whose
    update is added to the MLP's. ``mlp_returns_tuple``, ``returns_tuple``: the MLP returns its
    update, or the layer its stream, as the first of two.
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
    router: str | None = None
    activation: str = "act_fn"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    mlp_dropout: str | None = None
    intermediate: str | None = "mlp.down_proj"
    final_norm: str = "model.norm"
    pre_norm_flag: str | None = None
    residual_scale: str | None = None
    parallel: bool = False
    half_rotary: bool = True
    reads_positions: bool = False
    own_attention: bool = False
    adds_residual: bool = False
    recurrent: "Family | None" = None
    carries_state: bool = False
    mlp_beside: str | None = None
    layer_input: tuple[str, ...] = ()
    layer_scale: str | None = None
    shares_keys: bool = False
    mlp_returns_tuple: bool = False
    returns_tuple: bool = False
    logits_divisor: str | None = None  # in the model's config, and so are these
    logits_factor: str | None = None
    logits_softcap: str | None = None

    def of_layer(self, layer: nn.Module) -> "Family":
        """The row of one layer of the family."""
        row = self.recurrent
        if row is not None and getattr(layer, row.attention, None) is not None:
            return row
        return self

    def divisor(self, config: Any) -> float:
        """The number that logits are divided by."""
        if self.logits_factor is not None:
            return 1 / getattr(config, self.logits_factor)
        return 1.0 if self.logits_divisor is None else getattr(config, self.logits_divisor)

    def softcap(self, config: Any) -> float | None:
        """The soft cap of logits, if there is one."""
        return None if self.logits_softcap is None else getattr(config, self.logits_softcap)


def with_experts(row: Family, router: str = "gate") -> Family:
    """``row`` with experts in place of an MLP."""
    return replace(row, intermediate=None, gate=(), router=router)


# Rows that more than one table begins with.
OLMO_2 = Family(
    attention_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
)
GRANITE_MOE = with_experts(
    Family(
        mlp=("block_sparse_moe",),
        residual_scale="residual_multiplier",
        logits_divisor="logits_scaling",
    ),
    "router",
)
