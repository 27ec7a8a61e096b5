"""The sparse decoder layer: kept rows in, the family's own attention and MLP, kept rows out.

A layer of the model becomes an instance of a cached subclass of its own class, with the same name:
state dicts, hooks, PEFT and FSDP's lookup by class name see what they saw before. What belongs to
LeMo lives in one plain attribute outside the module tree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lemo_hf.families import Family
from lemo_hf.kept_inputs import kept_attention_inputs
from lemo_hf.kernels.rows import close_stream, open_stream, update_rows
from lemo_hf.passes import Passes
from lemo_hf.policies import POLICIES, ScoreInputs
from lemo_hf.step import Step

_PLAN = "_lemo_plan"


@dataclass
class LayerPlan:
    """What one sparse layer must know.

    Attributes:
        family: Where its parts are.
        index: Its place in the stack.
        retention: Of its attention.
        mlp_retention: Of its MLP; None if the MLP keeps the attention's rows.
        opens: It is the first of a run of sparse layers, so it copies the stream.
        closes: It is the last of a run.
        checkpoint: Store kept rows only; None follows the model's gradient checkpointing.
        predictor: For the predictor policy.
        passes: Knows the forward pass under way.
    """

    family: Family
    index: int
    retention: float
    mlp_retention: float | None
    opens: bool
    closes: bool
    checkpoint: bool | None
    predictor: Callable[[Tensor], Tensor] | None
    passes: Passes


class SparseLayer:
    """Mixed in before a decoder layer's class; see the module's docstring."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        plan: LayerPlan = self.__dict__[_PLAN]
        step = plan.passes.step
        if step is None:
            cached = kwargs.get("past_key_values") is not None
            if self.training and torch.is_grad_enabled() and not cached:
                raise RuntimeError(
                    f"layer {plan.index} was called in training mode outside a pass of its causal "
                    "LM, where it would run dense. Call the causal LM itself; for a dense pass "
                    "call model.eval() or remove_lemo(model) first."
                )
            return super().forward(hidden_states, **kwargs)
        return _sparse_forward(self, plan, step, hidden_states, **kwargs)

    @property
    def _gradient_checkpointing_func(self) -> Callable:
        # transformers checkpoints a layer by this function. A sparse layer stores its kept rows
        # rather than its whole input, so during a sparse pass the wrapper must do nothing.
        if self.__dict__[_PLAN].passes.step is None:
            return self.__dict__["_gradient_checkpointing_func"]
        return _call

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable) -> None:
        self.__dict__["_gradient_checkpointing_func"] = function


def _call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


@cache
def _sparse_class(base: type) -> type:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (SparseLayer, base), names)


def make_sparse(layer: nn.Module, plan: LayerPlan) -> None:
    """Turn ``layer`` into its sparse subclass, in place."""
    layer.__dict__[_PLAN] = plan
    layer.__class__ = _sparse_class(type(layer))


def make_stock(layer: nn.Module) -> None:
    """Undo `make_sparse`."""
    layer.__class__ = type(layer).__mro__[2]
    del layer.__dict__[_PLAN]


def _sparse_forward(
    layer: nn.Module,
    plan: LayerPlan,
    step: Step,
    x: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    position_ids: Tensor | None = None,
    past_key_values: None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """The stream ``x [B, T, H]``, its kept rows updated in place (in a copy if the layer opens)."""
    if plan.opens or x._is_view():  # FSDP2 hands each layer a view that must not be written to
        x = open_stream(x)
    flash = _uses_flash(layer, plan.family, step)
    run = _checkpointed(layer, plan)

    def score(sublayer: str) -> Tensor:
        with torch.no_grad():
            return POLICIES[step.config.policy](
                ScoreInputs(
                    layer=layer,
                    family=plan.family,
                    layer_index=plan.index,
                    sublayer=sublayer,
                    x=x.detach(),
                    position_embeddings=position_embeddings,
                    step=step,
                    predictor=plan.predictor,
                )
            )

    shares = plan.mlp_retention is None
    kept = step.choose(
        plan.index, "attention", plan.retention, partial(score, "attention"), shared=shares
    )

    def attend(rows: Tensor) -> Tensor:
        inputs = kept_attention_inputs(kept, step, position_embeddings, attention_mask, flash)
        return attention_rows(layer, plan.family, rows, **{**kwargs, **inputs})

    mlp = partial(mlp_rows, layer, plan.family)
    if shares:
        x = update_rows(x, kept.index, run(lambda rows: mlp(attend(rows))), kept.slot_mask)
    else:
        x = update_rows(x, kept.index, run(attend), kept.slot_mask)
        mlp_kept = step.choose(plan.index, "mlp", plan.mlp_retention, partial(score, "mlp"))
        x = update_rows(x, mlp_kept.index, run(mlp), mlp_kept.slot_mask)
    return close_stream(x) if plan.closes else x


def attention_rows(layer: nn.Module, family: Family, rows: Tensor, **kwargs: Any) -> Tensor:
    """``rows [B, K, H]`` after the attention sublayer, residual included."""
    attention = getattr(layer, family.attention)
    return _residual(
        layer,
        family,
        rows,
        lambda hidden: attention(hidden_states=hidden, past_key_values=None, **kwargs)[0],
        family.attention_norm,
        family.attention_output_norm,
        family.attention_dropout,
    )


def mlp_rows(layer: nn.Module, family: Family, rows: Tensor) -> Tensor:
    """``rows [B, K, H]`` after the MLP sublayer, residual included."""

    def mlp(hidden: Tensor) -> Tensor:
        for name in family.mlp:
            hidden = getattr(layer, name)(hidden)
        return hidden

    return _residual(
        layer, family, rows, mlp, family.mlp_norm, family.mlp_output_norm, family.mlp_dropout
    )


def _residual(
    layer: nn.Module,
    family: Family,
    rows: Tensor,
    sublayer: Callable[[Tensor], Tensor],
    norm: str | None,
    output_norm: str | None,
    dropout: str | None,
) -> Tensor:
    """``rows + sublayer(norm(rows))`` with what the family puts in between, in the stock order."""
    post_norm = family.pre_norm_flag is not None and not getattr(layer, family.pre_norm_flag)
    hidden = getattr(layer, norm)(rows) if norm and not post_norm else rows
    hidden = sublayer(hidden)
    if output_norm:
        hidden = getattr(layer, output_norm)(hidden)
    if dropout:
        drop = getattr(layer, dropout)
        if isinstance(drop, nn.Module):
            hidden = drop(hidden)
        else:
            hidden = nn.functional.dropout(hidden, p=drop, training=layer.training)
    if family.residual_scale:
        hidden = hidden * getattr(layer, family.residual_scale)
    rows = rows + hidden
    return getattr(layer, norm)(rows) if norm and post_norm else rows


def _checkpointed(layer: nn.Module, plan: LayerPlan) -> Callable[[Callable], Callable]:
    """How a layer runs a function of its kept rows: plainly, or storing nothing but the rows."""
    wanted = getattr(layer, "gradient_checkpointing", False)
    if plan.checkpoint is not None:
        wanted = plan.checkpoint
    if not wanted:
        return lambda function: function
    # The model's own checkpoint function, so that its options (offload, reentrant) hold here too.
    function = layer.__dict__.get("_gradient_checkpointing_func")
    return partial(partial, function or partial(checkpoint, use_reentrant=False))


def _uses_flash(layer: nn.Module, family: Family, step: Step) -> bool:
    attention = getattr(layer, family.attention)
    implementation = attention.config._attn_implementation
    if "flash" not in implementation:
        return False
    window = getattr(attention.config, "sliding_window", None)
    window = getattr(attention, "sliding_window", window)  # None where only other layers slide
    if window is not None and window < step.tokens:
        raise ValueError(
            f"{implementation} counts a sliding window of {window} in kept rows, not in tokens, "
            f"and the sequence has {step.tokens}. Use attn_implementation='sdpa'."
        )
    return True
