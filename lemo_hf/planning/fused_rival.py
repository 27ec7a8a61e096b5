"""The stock model with fused kernels, as transformers' ``use_liger_kernel=True`` has them.

Head and loss are one: in place of all logits there are those of a part of the rows, and their
gradient in the same place. Norms store their input alone, and gated MLPs what their projections
return, whose gradients take the same place. That is so where LeMo's kernels know a model's norms
and MLPs; elsewhere these stay the model's own, as rotary positions do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.autograd import Function

from lemo_hf.altered import altering
from lemo_hf.core import fused as kernels
from lemo_hf.core.family import Family
from lemo_hf.core.fused import final_norm, gated_activations, norm_of
from lemo_hf.core.loss import shifted
from lemo_hf.core.own_loss import StandIn
from lemo_hf.kernels.gather_norm import add_norm
from lemo_hf.kernels.norm import Norm
from lemo_hf.kernels.segment_cross_entropy import segment_cross_entropy

NORMS = ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")


@contextmanager
def fused(
    model: Any, family: Family, layers: Sequence[nn.Module], labels: Tensor
) -> Iterator[None]:
    """Within it one step of a causal LM with these ``layers`` is so; ``labels [B, T]``."""
    head, made = model.get_output_embeddings(), []

    def of_hidden(hidden: Tensor) -> Tensor:
        made.append(_loss(model, family, head, hidden, labels))
        return hidden.new_empty(1, 1, 1)  # which stands for the logits

    changed: list[tuple[Any, Callable[[Tensor], Tensor] | None]] = []
    if (last := final_norm(model, family)) is not None:
        changed.append((model.get_submodule(family.final_norm), _norm(last)))
    for layer in layers:
        for name in {getattr(family, name) for name in NORMS} - {None}:
            norm = getattr(layer, name, None)
            changed.append((norm, _norm(norm_of(norm, family.norm))))
        changed.append((getattr(layer, family.mlp[0]), _mlp(layer, family)))
    stand_in = StandIn(head, of_hidden)
    with ExitStack() as stack:
        stack.callback(stand_in.remove)
        stack.enter_context(altering(kernels, gated_activation=lambda *x: _Gated.apply(*x[:2])))
        stack.enter_context(altering(model, _loss_function=lambda *_, **__: made.pop()))
        for module, forward in changed:
            if forward is not None:
                stack.enter_context(altering(module, forward=forward))
        yield


def part_rows(rows: int, vocabulary: int, width: int) -> int:
    """Rows of a part, so that its logits take about as much as all of what the head reads.

    Source: ``fused_linear_cross_entropy_forward`` of Liger-Kernel 0.8.
    """
    return triton.next_power_of_2(triton.cdiv(rows, triton.cdiv(vocabulary, width)))


def _loss(model: Any, family: Family, head: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    rows = hidden.flatten(0, 1)
    total = segment_cross_entropy(
        rows,
        shifted(labels).flatten(),
        torch.ones(len(rows)),
        head,
        segment_size=part_rows(len(rows), head.out_features, rows.shape[1]),
        divisor=family.divisor(model.config),
        softcap=family.softcap(model.config),
        parameters=[p for p in head.parameters() if p.requires_grad],
    )
    return total / len(rows)


def _norm(norm: Norm | None) -> Callable[[Tensor], Tensor] | None:
    if norm is None or norm.kind == "layer":  # PyTorch's own is fused as it is
        return None
    return lambda x: add_norm(x, None, norm)[1]


class _Gated(Function):
    """Two tensors are read and one is written; behind, three are read and two are overwritten."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate.mul_(grad), up.mul_(grad)


def _mlp(layer: nn.Module, family: Family) -> Callable[[Tensor], Tensor] | None:
    run = gated_activations(layer, family)
    if run is None or family.intermediate is None:
        return None
    last = layer.get_submodule(family.intermediate)
    return lambda x: last(run(x))
