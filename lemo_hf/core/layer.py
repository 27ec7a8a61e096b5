"""The decoder layer in a sparse pass: kept rows in, its own attention and MLP, kept rows out.

A dense layer keeps every row and runs the same code. A layer of the model becomes an instance of a
cached subclass of its own class, with the same name: state dicts, hooks, PEFT and FSDP's lookup by
class name work as before. LeMo's data are in one plain attribute outside the module tree.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lemo_hf.batch.selection import KeptSet
from lemo_hf.config import UNITS, KeepRule
from lemo_hf.core.attention import fastest_attention, implementation_of, using
from lemo_hf.core.attention_call import call_attention
from lemo_hf.core.family import Family
from lemo_hf.core.kept_inputs import kept_attention_inputs, kept_positions, kept_rows
from lemo_hf.core.layer_class import sparse_class, stock_class
from lemo_hf.core.passes import Passes
from lemo_hf.core.plain_pickle import plain_or_whole
from lemo_hf.core.policies import ScoreInputs, rank
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.core.sublayer import (
    Sublayer,
    attention_sublayer,
    balanced,
    ending,
    mlp_sublayer,
    run_sublayers,
)
from lemo_hf.kernels.gather_norm import gather_norm
from lemo_hf.kernels.rows import add_update, close_stream, open_stream, own_stream
from lemo_hf.kernels.scatter_add import scatter_add_
from lemo_hf.memory.recompute import checkpointed
from lemo_hf.parallel.sequence_parallel import Share
from lemo_hf.predictors.block_predictor import BlockPredictor

_SETUP = "_lemo_setup"
_CACHES = ("past_key_values", "layer_past")
_OF_FSDP2 = "RegisterPostBackwardFunctionBackward"  # makes a view of each layer's input


@dataclass
class LayerSetup:
    """LeMo's data of one layer.

    Attributes:
        family: Names of its parts, for this kind of layer.
        index: Index of the layer in the model.
        rule: Rule of how much its attention keeps; None if the layer is dense.
        mlp_rule: Rule of how much its MLP keeps; None if the MLP keeps what the attention keeps.
        closes: Whether it is the last layer.
        recompute: Level of recomputation, one of `LEVELS`; None follows the model's gradient
            checkpointing.
        predictor: Predictor of this layer for ``policy="predictor"``, or None.
        passes: Passes of the model, which know the one under way.
    """

    family: Family
    index: int
    rule: KeepRule | None
    mlp_rule: KeepRule | None
    closes: bool
    recompute: str | None
    predictor: BlockPredictor | None
    passes: Passes


# A mixin has no base of its own; type checkers are told whose methods it stands before.
if TYPE_CHECKING:
    _Mixed = nn.Module
else:
    _Mixed = object


class SparseLayer(_Mixed):
    """Mixin before a decoder layer's class; see the module's docstring."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _SETUP not in self.__dict__:  # LeMo is off, and somebody kept this method
            inert = isinstance(self, SparseLayer)
            stock = super().forward if inert else partial(type(self).forward, self)
            return stock(hidden_states, *args, **kwargs)
        setup: LayerSetup = self.__dict__[_SETUP]
        sparse_pass = setup.passes.current
        names = list(signature(super().forward).parameters)[1:] if args else ()
        kwargs |= zip(names, args, strict=False)  # GPT-2 gives some by place
        if sparse_pass is None:
            stray = not (setup.passes.plain or setup.passes.resting)
            stray &= self.training and torch.is_grad_enabled()
            if stray and not any(_holds_tokens(kwargs.get(name)) for name in _CACHES):
                raise RuntimeError(
                    f"layer {setup.index} was called in training mode outside a pass of its causal "
                    "LM, where it would run dense. Call the causal LM itself; for a dense pass "
                    "call model.eval() or remove_lemo(model) first."
                )
            return super().forward(hidden_states, **kwargs)
        x = _sparse_forward(self, setup, sparse_pass, hidden_states, **kwargs)
        return (x, None) if setup.family.returns_tuple else x

    @property
    def _gradient_checkpointing_func(self) -> Callable:
        # transformers checkpoints a layer by this function. A sparse layer stores its kept rows
        # rather than its whole input, so during a sparse pass the wrapper must do nothing.
        if _SETUP not in self.__dict__:
            return self.__dict__["_gradient_checkpointing_func"]
        passes = self.__dict__[_SETUP].passes
        if passes.current is not None:
            return _call
        own = self.__dict__["_gradient_checkpointing_func"]
        return partial(_plainly, passes, own) if passes.plain else own

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable) -> None:
        self.__dict__["_gradient_checkpointing_func"] = function

    def __reduce_ex__(self, protocol: Any) -> tuple:
        kind = stock_class(SparseLayer, type(self))  # type: ignore[arg-type]
        setup: LayerSetup | None = self.__dict__.get(_SETUP)
        model = self if setup is None else setup.passes.model
        return plain_or_whole(kind, self, (_SETUP,), model)


def _holds_tokens(cache: Any) -> bool:
    """Whether earlier tokens are in a KV cache. Models make themselves an empty one."""
    length = getattr(cache, "get_seq_length", None)
    return cache is not None and (length is None or int(length()) > 0)


def _call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _plainly(passes: Passes, checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """Checkpoint a layer of a plain pass, so that its second run, in the backward, is plain as
    well."""

    def run(*inner: Any, **kwargs: Any) -> Any:
        before, passes.plain = passes.plain, True
        try:
            return function(*inner, **kwargs)
        finally:
            passes.plain = before

    return checkpoint(run, *args)


def make_sparse(layer: nn.Module, setup: LayerSetup) -> None:
    """Turn ``layer`` into its sparse subclass, in place."""
    layer.__dict__[_SETUP] = setup
    # mypy takes the hash of a module for that of its class.
    layer.__class__ = sparse_class(SparseLayer, type(layer))  # type: ignore[arg-type]


def make_stock(modules: Iterable[nn.Module]) -> None:
    """Undo `make_sparse` for those of ``modules`` that are sparse layers."""
    for layer in modules:
        if vars(layer).pop(_SETUP, None) is not None:
            layer.__class__ = stock_class(SparseLayer, type(layer))  # type: ignore[arg-type]


@torch.compiler.disable
def _sparse_forward(
    layer: nn.Module,
    setup: LayerSetup,
    sparse_pass: SparsePass,
    x: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    per_layer_input: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The layer's pass: the stream ``x [B, T, H]``, with its kept rows updated in place."""
    sparse_pass.ran.add(setup.index)
    x = _stream(x, setup, sparse_pass)
    attends = not setup.family.carries_state
    flash = attends and setup.rule is not None and _uses_flash(layer, setup.family, sparse_pass)

    def score(sublayer: str) -> Tensor:
        with torch.no_grad():
            scores = rank(
                ScoreInputs(
                    layer=layer,
                    family=setup.family,
                    layer_index=setup.index,
                    sublayer=sublayer,
                    x=x.detach(),
                    position_embeddings=position_embeddings,
                    position_ids=position_ids if setup.family.reads_positions else None,
                    sparse_pass=sparse_pass,
                    # Where the stream is: layers may lie on several devices.
                    predictor=None if setup.predictor is None else setup.predictor.to(x.device),
                )
            )
            return scores if sparse_pass.shards is None else sparse_pass.shards.agreed(scores)

    shares = setup.mlp_rule is None
    if setup.rule is None:
        kept = sparse_pass.everything
    else:
        kept = sparse_pass.choose(
            setup.index, "attention", setup.rule, partial(score, "attention"), shared=shares
        )

    share = sparse_pass.share(kept)

    # Found here, since what is tried inside a unit would be stored for its backward.
    setup.passes.dtype = dtype = _dtype_of(x)
    kernels = fastest_attention(getattr(layer, setup.family.attention), x.device, dtype)

    def attend(hidden: Tensor, unread: str | None = None) -> Tensor:
        inputs = kept_attention_inputs(
            kept,
            sparse_pass,
            setup.family,
            attention_mask,
            position_ids,
            kwargs.get("alibi"),
            flash,
        )
        module = getattr(layer, setup.family.attention)
        if setup.family.carries_state:
            return module(hidden_states=hidden, attention_mask=inputs["attention_mask"])
        positions = kept_positions(position_embeddings, kept if share is None else share.work)
        halves = setup.family.half_rotary
        inputs = {"hidden_states": hidden, **kwargs, **inputs}
        with using(kernels):
            return call_attention(module, positions, share, unread, halves, **inputs)

    level = setup.recompute or _level(layer, setup, sparse_pass, x)
    attention = attention_sublayer(layer, setup.family, attend)
    # An MLP that runs again by itself hands nothing on when its layer runs again, and here a
    # sublayer behind it needs what it makes.
    alone = level != "none" and not setup.family.layer_input
    mlp = mlp_sublayer(layer, setup.family, again=alone)
    if level == "mlp" and not mlp.again:
        level = "selective"  # an MLP that cannot run again alone does so with the layer
    if level == "selective" and mlp.beside:
        level = "lean"  # the sum that "selective" keeps does not exist
    update = partial(_update, layer, setup, level)

    def rest(kept: KeptSet) -> list[Sublayer]:
        last = mlp
        if sparse_pass.load is not None:
            counted = sparse_pass.counted(kept)
            last = balanced(mlp, layer, setup.family, sparse_pass.load, counted)
        return ending(last, layer, setup.family, partial(kept_rows, per_layer_input, kept))

    x = update(x, kept, share, [attention, *rest(kept)] if shares else [attention])
    if setup.mlp_rule is not None:
        mlp_kept = sparse_pass.choose(setup.index, "mlp", setup.mlp_rule, partial(score, "mlp"))
        x = update(x, mlp_kept, sparse_pass.share(mlp_kept), rest(mlp_kept))
    return close_stream(x) if setup.closes and not sparse_pass.owns_gradient else x


def _stream(x: Tensor, setup: LayerSetup, sparse_pass: SparsePass) -> Tensor:
    """The stream, in memory that may be updated in place."""
    if setup.index in sparse_pass.wrapped:  # what stands around the layer may read the stream too
        return open_stream(x)
    if x._is_view():
        # FSDP2's is what the layer before returned, which nobody else reads.
        handed_on = setup.index > 0 and type(x.grad_fn).__name__ == _OF_FSDP2
        return own_stream(x) if handed_on and x.is_contiguous() else open_stream(x)
    if hasattr(type(x.grad_fn), "_saved_result"):  # a hook's, as of tanh, whose backward reads it
        return open_stream(x)
    if setup.index > 0:
        return x
    if not sparse_pass.owns_embeddings or setup.family.layer_input:  # made of the embeddings too
        return open_stream(x)
    # With adapters, checkpointing makes the embeddings ask for a gradient that nobody reads.
    return (x.detach() if x.is_leaf else x).contiguous()


def _update(
    layer: nn.Module,
    setup: LayerSetup,
    level: str,
    x: Tensor,
    kept: KeptSet,
    share: Share | None,
    sublayers: list[Sublayer],
) -> Tensor:
    """Run ``sublayers`` on the kept rows of the stream, and store the results back into it."""
    # What is computed again begins with the rows, so that nothing but they is stored.
    again = level in UNITS
    late = again or share is not None or sublayers[0].again
    norm = None if late else sublayers[0].fused_norm()
    index = kept.index if share is None else share.index
    x, rows, hidden = gather_norm(x, index, norm, kept.slot_mask)
    rows = rows if share is None else share.spread(rows)
    if again and not sublayers[0].again:
        # The model's own checkpoint function, so that its offload holds.
        own = layer.__dict__.get("_gradient_checkpointing_func")
        run = partial(run_sublayers, sublayers)
        rows, update = checkpointed(run, rows, level, own, setup.passes.host, setup.index)
    else:
        rows, update = run_sublayers(sublayers, rows, hidden=hidden)
    scale = sublayers[-1].scale
    if share is not None:
        rows, update = share.collect(add_update(rows, update, scale).to(x.dtype)), None
    return scatter_add_(x, rows, update, index, kept.slot_mask, scale)


def _level(layer: nn.Module, setup: LayerSetup, sparse_pass: SparsePass, x: Tensor) -> str:
    """The level that the model's gradient checkpointing asks for."""
    if not getattr(layer, "gradient_checkpointing", False):
        return "none"
    return setup.passes.levels.of(sparse_pass, x)


def _dtype_of(hidden: Tensor) -> torch.dtype:
    """Dtype of products with ``hidden``, with or without autocast."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _uses_flash(layer: nn.Module, family: Family, sparse_pass: SparsePass) -> bool:
    attention = getattr(layer, family.attention)
    implementation = implementation_of(attention)
    if "flash" not in implementation:
        return False
    window = getattr(attention.config, "sliding_window", None)
    window = getattr(attention, "sliding_window", window)  # None where only other layers slide
    if window is not None and window < sparse_pass.tokens:
        raise ValueError(
            f"{implementation} counts a sliding window of {window} in kept rows, not in tokens, "
            f"and the sequence has {sparse_pass.tokens} tokens. Use attn_implementation='sdpa' (or "
            "'eager', if transformers has no 'sdpa' for the model), or shorter sequences."
        )
    return True
