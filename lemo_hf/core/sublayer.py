"""The residual updates of a layer on its kept rows: norm, module, and what follows it.

The addition of an update stays pending, since the next operation does it on the way: the norm of
the next sublayer (`add_norm`), or the store into the stream (`scatter_add_`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor, nn

from lemo_hf.core.family import Family
from lemo_hf.core.fused import gated_activations, norm_of
from lemo_hf.core.lora import linear_of
from lemo_hf.core.router_load import RouterLoad
from lemo_hf.kernels.gather_norm import add_norm
from lemo_hf.kernels.launch import sharded
from lemo_hf.kernels.norm import Norm
from lemo_hf.kernels.rows import add_update
from lemo_hf.memory.recompute import Unit, rerun_rows


@dataclass(frozen=True)
class Sublayer:
    """One residual update ``rows + scale * output(run(norm(rows)))``, in the family's order.

    Attributes:
        run: Attention or MLP, which maps normed rows ``[B, K, H]`` to their update.
        norm: Norm before ``run``; None if the family has none there.
        output_norm: Norm after ``run``, or None.
        post_norm: Norm after the residual addition (OPT's other order), or None.
        kind: Kind of the norms, as `KINDS` names it.
        dropout: Dropout of the output, or None.
        scale: Factor of the update.
        modules: Modules that ``run`` calls.
        width: Width of the widest activation inside ``run``, elements; None if not known.
        again: Whether it stores only its rows, and runs again in the backward.
        again_run: Function with the gradients of ``run``, called when nobody reads the result.
            None: ``run`` itself.
        beside: Whether it reads the rows that the sublayer before it has read, without that one's
            update.
    """

    run: Callable[[Tensor], Tensor]
    norm: nn.Module | None
    output_norm: nn.Module | None
    post_norm: nn.Module | None
    kind: str
    dropout: Callable[[Tensor], Tensor] | None
    scale: float
    modules: tuple[nn.Module, ...]
    width: int | None = None
    again: bool = False
    again_run: Callable[[Tensor], Tensor] | None = None
    beside: bool = False

    @property
    def plain(self) -> bool:
        """Whether only the sum of rows and update reads what ``run`` returns."""
        return (self.output_norm, self.post_norm, self.dropout) == (None, None, None)

    def fused_norm(self) -> Norm | None:
        """The norm for a kernel that reads rows; None if there is no norm or its module must be
        called."""
        return norm_of(self.norm, self.kind)

    def enter(self, rows: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add the pending update. Returns the rows, and the input of ``run``."""
        norm = self.fused_norm()
        if norm is not None:
            return add_norm(rows, update, norm, self.scale)
        rows = add_update(rows, update, self.scale)
        return rows, rows if self.norm is None else self.norm(rows)

    def apply(self, rows: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run on ``hidden``. Returns the rows, and the update that is pending now."""
        update = self.run(hidden)
        if self.output_norm is not None:
            norm = norm_of(self.output_norm, self.kind)
            update = self.output_norm(update) if norm is None else add_norm(update, None, norm)[1]
        if self.dropout is not None:
            update = self.dropout(update)
        if self.post_norm is not None:
            return self.post_norm(add_update(rows, update, self.scale)), None
        return rows, update

    def unread(self) -> "Sublayer":
        """The same sublayer for a run whose update nobody reads."""
        return self if self.again_run is None else replace(self, run=self.again_run)

    def rerun(
        self, rows: Tensor, update: Tensor | None, unit: Unit | None
    ) -> tuple[Tensor, Tensor | None]:
        """`enter` and `apply`, which store only the sum of rows and update."""

        def run(tile: Tensor) -> tuple[Tensor, Tensor | None]:
            # Gradients are on where it runs again.
            this = self.unread() if torch.is_grad_enabled() else self
            return this.apply(*this.enter(tile, None))

        norms = [x for x in (self.norm, self.output_norm, self.post_norm) if x is not None]
        behind = self.post_norm is not None
        modules = [*self.modules, *norms]
        return rerun_rows(run, modules, rows, update, self.scale, self.width, behind, unit)


def run_sublayers(
    sublayers: list[Sublayer],
    rows: Tensor,
    unit: Unit | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run all ``sublayers`` on one set of rows, one after the other.

    Args:
        sublayers: Sublayers, at least one.
        rows: ``[B, K, H]``.
        unit: Unit of recomputation that they belong to; None if they do not run again.
        hidden: Input of the first sublayer, if its norm was already computed.

    Returns:
        Rows ``[B, K, H]`` and the update still to be added to them, or None.
    """
    if sublayers[-1].beside:
        return _run_beside(sublayers[0], sublayers[1], rows, unit, hidden)
    update = None
    for sublayer in sublayers:
        if sublayer.again and hidden is None:
            rows, update = sublayer.rerun(rows, update, unit)
            continue
        if hidden is None:
            rows, hidden = sublayer.enter(rows, update)
        if unit is not None and unit.update_unread:
            sublayer = sublayer.unread()
        rows, update = sublayer.apply(rows, hidden)
        hidden = None
    return rows, update


def _run_beside(
    attention: Sublayer, mlp: Sublayer, rows: Tensor, unit: Unit | None, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`run_sublayers` of a parallel layer: both read the same rows, and one update is pending."""
    if hidden is None:
        rows, hidden = attention.enter(rows, None)
    if unit is not None and unit.again:  # what it returns is read by nobody
        attention = attention.unread()
    rows, update = attention.apply(rows, hidden)
    if mlp.again:
        rows, other = mlp.rerun(rows, None, unit)
    else:
        if mlp.norm is not attention.norm:
            rows, hidden = mlp.enter(rows, None)
        rows, other = mlp.apply(rows, hidden)
    assert update is not None and other is not None  # no norm stands behind the addition
    return rows, update + other


def attention_sublayer(layer: nn.Module, family: Family, attend: Callable[..., Tensor]) -> Sublayer:
    """The attention of ``layer``, called by ``attend(rows, unread=projection)``; see
    `call_attention`."""
    names = (family.attention_norm, family.attention_output_norm, family.attention_dropout)
    made = _sublayer(layer, family, attend, (getattr(layer, family.attention),), *names)
    if not made.plain:
        return made
    return replace(made, again_run=partial(attend, unread=family.attention_output))


def mlp_sublayer(layer: nn.Module, family: Family, again: bool) -> Sublayer:
    """The MLP of ``layer``; ``again`` as for `Sublayer`, False if its calls gather weights."""
    parts = tuple(getattr(layer, name) for name in (*family.mlp, *_beside(family)))
    calls = mlp_calls(layer, family)
    # ZeRO-3 leaves nothing of a weight between calls, so `rerun_rows` could hand no gradient on,
    # and processes with more tiles would wait for the others forever.
    again = again and not any(map(sharded, parts))
    inner = None if family.intermediate is None else layer.get_submodule(family.intermediate)
    names = (family.mlp_norm, family.mlp_output_norm, family.mlp_dropout)
    first = gated_activations(layer, family)
    if first is None and inner is parts[-1]:
        first = partial(_chain, calls[:-1])
    run: Callable[[Tensor], Tensor] = partial(_chain, calls)
    if first is not None and inner is not None:
        run = partial(_chain, (first, linear_of(inner)))
    mlp = _sublayer(layer, family, run, parts, *names)
    # Where nothing reads the last product but the sum of rows and update, it is not run again.
    again_run = None
    if first is not None and inner is not None and mlp.plain:
        again_run = partial(_chain, (first, linear_of(inner, values=False)))
    width = getattr(inner, "in_features", None)
    return replace(mlp, again=again, again_run=again_run, width=width, beside=family.parallel)


def ending(
    mlp: Sublayer, layer: nn.Module, family: Family, own: Callable[[], Tensor]
) -> list[Sublayer]:
    """``mlp`` and what follows it; ``own()`` gives the layer's own input for its rows,
    ``[B, K, D]``."""
    sublayers = [mlp]
    if family.layer_input and hasattr(layer, family.layer_input[0]):
        gate, projection, _ = (getattr(layer, name) for name in family.layer_input)
        activation = getattr(layer, family.activation)

        def run(hidden: Tensor) -> Tensor:
            return projection(activation(gate(hidden)) * own())

        norm = family.layer_input[-1]
        sublayers.append(_sublayer(layer, family, run, (gate, projection), None, norm, None))
    if family.layer_scale is not None:
        factor = _Factor(partial(getattr, layer, family.layer_scale))
        sublayers[-1] = replace(sublayers[-1], post_norm=factor)
    return sublayers


class _Factor(nn.Module):
    """Multiplies the stream by the tensor that ``get`` returns, which is not part of this
    module."""

    def __init__(self, get: Callable[[], Tensor]):
        super().__init__()
        self._get = get

    def forward(self, rows: Tensor) -> Tensor:
        return (rows * self._get()).to(rows.dtype)


def balanced(
    mlp: Sublayer, layer: nn.Module, family: Family, load: RouterLoad, counted: Tensor | None
) -> Sublayer:
    """``mlp``, whose router, if it has one, reports its choices for ``counted`` rows to
    ``load``."""
    router = getattr(getattr(layer, family.mlp[0]), family.router or "", None)
    if router is None:
        return mlp
    return replace(mlp, run=partial(load.run, mlp.run, router, counted))


def mlp_calls(layer: nn.Module, family: Family) -> list[Callable[[Tensor], Tensor]]:
    """The MLP of ``layer``: modules to call one after the other."""
    parts = [getattr(layer, name) for name in family.mlp]
    if family.mlp_returns_tuple:
        parts.append(itemgetter(0))
    if family.mlp_beside is not None:
        return [partial(_sum, partial(_chain, parts), getattr(layer, family.mlp_beside))]
    return [partial(part, residual=0.0) for part in parts] if family.adds_residual else parts


def _beside(family: Family) -> tuple[str, ...]:
    return () if family.mlp_beside is None else (family.mlp_beside,)


def _sum(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], hidden: Tensor
) -> Tensor:
    return first(hidden) + second(hidden)


def _chain(modules: Sequence[Callable[[Tensor], Tensor]], hidden: Tensor) -> Tensor:
    for module in modules:
        hidden = module(hidden)
    return hidden


def _sublayer(
    layer: nn.Module,
    family: Family,
    run: Callable[[Tensor], Tensor],
    modules: tuple[nn.Module, ...],
    norm: str | None,
    output_norm: str | None,
    dropout: str | None,
) -> Sublayer:
    before = None if norm is None else getattr(layer, norm)
    behind = family.pre_norm_flag is not None and not getattr(layer, family.pre_norm_flag)
    return Sublayer(
        run,
        None if behind else before,
        None if output_norm is None else getattr(layer, output_norm),
        before if behind else None,
        family.norm,
        None if dropout is None else _dropout(layer, dropout),
        getattr(layer, family.residual_scale) if family.residual_scale else 1.0,
        modules,
    )


def _dropout(layer: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    drop = getattr(layer, name) if hasattr(layer, name) else getattr(layer.config, name)
    if isinstance(drop, nn.Module):
        return drop
    return lambda hidden: nn.functional.dropout(hidden, p=drop, training=layer.training)
