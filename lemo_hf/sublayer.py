"""The residual updates of a layer on rows that are kept: norm, module, what follows it.

The addition of an update is left pending, since whoever comes next can do it on the way: the norm
of the next sublayer (`add_norm`), or the store into the stream (`scatter_add_`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lemo_hf.families import Family
from lemo_hf.fused import gated_mlp, norm_of
from lemo_hf.kernels.gather_norm import add_norm
from lemo_hf.kernels.norm import Norm
from lemo_hf.kernels.rows import add_update


@dataclass(frozen=True)
class Sublayer:
    """One residual update ``rows + scale * output(run(norm(rows)))``, in the family's order.

    Attributes:
        run: The attention or MLP: ``[B, K, H]`` normed rows to their update.
        norm: Before ``run``; None if the family has none there.
        output_norm: After ``run``, or None.
        post_norm: After the residual addition (OPT's other order), or None.
        kind: Of the norms, as `KINDS` names it.
        dropout: Of the output, or None.
        scale: Of the update.
    """

    run: Callable[[Tensor], Tensor]
    norm: nn.Module | None
    output_norm: nn.Module | None
    post_norm: nn.Module | None
    kind: str
    dropout: Callable[[Tensor], Tensor] | None
    scale: float

    def fused_norm(self) -> Norm | None:
        """The norm for a kernel that reads rows; None if there is none or it must be called."""
        return norm_of(self.norm, self.kind)

    def enter(self, rows: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add what is pending; the rows, and what ``run`` reads of them."""
        norm = self.fused_norm()
        if norm is not None:
            return add_norm(rows, update, norm, self.scale)
        rows = add_update(rows, update, self.scale)
        return rows, rows if self.norm is None else self.norm(rows)

    def apply(self, rows: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run on ``hidden``; the rows, and the update that is pending now."""
        update = self.run(hidden)
        if self.output_norm is not None:
            norm = norm_of(self.output_norm, self.kind)
            fused = norm is not None
            update = add_norm(update, None, norm)[1] if fused else self.output_norm(update)
        if self.dropout is not None:
            update = self.dropout(update)
        if self.post_norm is not None:
            return self.post_norm(add_update(rows, update, self.scale)), None
        return rows, update


def run_sublayers(
    sublayers: list[Sublayer], rows: Tensor, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """All ``sublayers`` on one set of rows, one after the other.

    Args:
        sublayers: At least one.
        rows: ``[B, K, H]``.
        hidden: What the first one is to run on, if its norm was taken already.

    Returns:
        Rows ``[B, K, H]`` and the update still to be added to them, or None.
    """
    update = None
    for sublayer in sublayers:
        if hidden is None:
            rows, hidden = sublayer.enter(rows, update)
        rows, update = sublayer.apply(rows, hidden)
        hidden = None
    return rows, update


def attention_sublayer(
    layer: nn.Module, family: Family, attend: Callable[[Tensor], Tensor]
) -> Sublayer:
    """The attention of ``layer``, called by ``attend``."""
    names = (family.attention_norm, family.attention_output_norm, family.attention_dropout)
    return _sublayer(layer, family, attend, *names)


def mlp_sublayer(layer: nn.Module, family: Family) -> Sublayer:
    """The MLP of ``layer``."""

    def modules(hidden: Tensor) -> Tensor:
        for name in family.mlp:
            hidden = getattr(layer, name)(hidden)
        return hidden

    names = (family.mlp_norm, family.mlp_output_norm, family.mlp_dropout)
    return _sublayer(layer, family, gated_mlp(layer, family) or modules, *names)


def _sublayer(
    layer: nn.Module,
    family: Family,
    run: Callable[[Tensor], Tensor],
    norm: str | None,
    output_norm: str | None,
    dropout: str | None,
) -> Sublayer:
    norm, output_norm = (name and getattr(layer, name) for name in (norm, output_norm))
    behind = family.pre_norm_flag is not None and not getattr(layer, family.pre_norm_flag)
    return Sublayer(
        run,
        None if behind else norm,
        output_norm,
        norm if behind else None,
        family.norm,
        dropout and _dropout(layer, dropout),
        getattr(layer, family.residual_scale) if family.residual_scale else 1.0,
    )


def _dropout(layer: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    drop = getattr(layer, name)
    if isinstance(drop, nn.Module):
        return drop
    return lambda hidden: nn.functional.dropout(hidden, p=drop, training=layer.training)
