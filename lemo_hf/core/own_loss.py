"""The model's own loss, made from the head's input: no ``[B, T, V]`` logits are made.

`makes_plain_loss` says whether this is the model's loss; any other loss is made by its own code.
Logits are made later, if they are read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from lemo_hf.core.checks import check_sharded_head
from lemo_hf.core.family import Family
from lemo_hf.core.fused import final_norm
from lemo_hf.core.lazy_logits import Logits, with_logits
from lemo_hf.core.loss import segment_loss
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.launch import runs_own_forward, sharded, untouched
from lemo_hf.kernels.norm import Norm
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX

_NO_LOGITS = (
    "a sparse pass makes its loss without logits, and here they cannot be made any more: {}. Or "
    "call the model without labels (inputs.pop('labels')): it then returns logits and no loss."
)
TOO_LATE = _NO_LOGITS.format("read them before the backward, which lets their stream go")
OF_SEQUENCES = _NO_LOGITS.format("each process that shares a sequence has those of its part")
OF_GRAPHS = _NO_LOGITS.format("a CUDA graph keeps none, set LeMoConfig(cuda_graphs=False)")


def makes_plain_loss(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether the model, called like this, takes the plain cross-entropy of transformers.

    It does not with another forward on it or its class, another ``loss_function`` or ``loss_type``,
    or an ``ignore_index`` that the caller gives.
    """
    if kwargs.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        return False
    return runs_own_forward(model) and model.loss_function is ForCausalLMLoss


def returns_tuple(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether the caller gets a tuple, which includes the logits."""
    wanted = kwargs.get("return_dict")
    return not (getattr(model.config, "return_dict", True) if wanted is None else wanted)


def norm_before_the_head(model: PreTrainedModel, family: Family) -> Norm | None:
    """The final norm, if nothing else is between the stream and the head."""
    parts = family.layers.split(".")[:-1]
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    between = [model.get_submodule(name) for name in names]
    if not all(untouched(part) and runs_own_forward(part) for part in between):
        return None
    return final_norm(model, family)


class OwnLoss:
    """Makes the loss of one pass; the model's own call of the head then reads one row a sequence.

    Args:
        model: Causal LM that is about to run.
        family: Names of its parts.
        sparse_pass: Sparse pass under way.
        targets: ``[B, T]`` token that each position must predict.
        num_items: Number of labels, as for `segment_loss`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        sparse_pass: SparsePass,
        targets: Tensor,
        num_items: Tensor | int | None,
    ):
        self._model, self._family, self._sparse_pass = model, family, sparse_pass
        self._targets, self._num_items = targets, num_items
        self._head = model.get_output_embeddings()
        self._hooks: list = []
        self._loss: Tensor | None = None
        self._logits: Logits | None = None  # of a sharded head, which is in parts after the pass
        if sharded(self._head):
            self._make_inside()
            return
        norm = norm_before_the_head(model, family)
        if norm is None:
            self._catch_head()
            return
        module = model.get_submodule(family.final_norm)

        def at_norm(hidden: Tensor) -> Tensor:
            self._make_of(hidden, norm, module)
            self._catch_head()
            return hidden.detach()

        # From here on the gradient of the stream is the loss's own, and norms exist by segments.
        sparse_pass.owns_gradient = True
        self._hooks.append(StandIn(module, at_norm))

    def remove(self) -> None:
        """Remove hooks that have not been called."""
        while self._hooks:
            self._hooks.pop().remove()

    def give(self, output: ModelOutput) -> ModelOutput:
        """The model's ``output`` with the loss, and with logits that are made when they are
        read."""
        assert self._loss is not None  # the head has been called
        load = self._sparse_pass.load
        if load is not None:
            self._loss, output["aux_loss"] = load.added_to(self._loss), load.loss()
        if self._logits is not None:
            return with_logits(output, self._loss, self._logits)
        output["loss"], output["logits"] = self._loss, None
        return output

    def _loss_of(self, hidden: Tensor, norm: Norm | None = None) -> Tensor:
        config, family = self._model.config, self._family
        return segment_loss(
            hidden,
            self._targets,
            self._sparse_pass,
            self._head,
            family,
            config,
            self._num_items,
            norm,
        )

    def _make_of(self, hidden: Tensor, norm: Norm | None = None, module: Any = None) -> None:
        self._loss = self._loss_of(hidden, norm)
        if self._sparse_pass.shards is not None:
            self._logits = Logits(None, OF_SEQUENCES)
            return
        config, family, kind = self._model.config, self._family, hidden.device.type
        # Nothing that it holds may hold it: the stream goes as soon as nobody can ask any more.
        make = partial(
            _make_logits,
            hidden,
            module,
            self._head,
            family.divisor(config),
            family.softcap(config),
            torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)),
        )
        self._logits = Logits(make, TOO_LATE)
        self._logits.go_with(self._loss)

    def _catch_head(self) -> None:
        # Before the head's other hooks, which its calls for the loss run as well.
        self._hooks.append(self._head.register_forward_pre_hook(self._at_head, prepend=True))

    def _at_head(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        self.remove()
        if self._loss is None:
            self._make_of(args[0])
        return (args[0][:, :1].detach(),)

    def _make_inside(self) -> None:
        """Make the head's next call return the loss.

        FSDP2 and ZeRO-3 gather a head for its call and for the backward of its result.
        """
        check_sharded_head(self._head)

        def after_head(_: nn.Module, args: Any, output: Tensor) -> None:
            self._loss = output

        self._hooks.append(StandIn(self._head, self._loss_of))
        self._hooks.append(self._head.register_forward_hook(after_head))


def _make_logits(
    hidden: Tensor,
    norm: nn.Module | None,
    head: nn.Module,
    divisor: float,
    softcap: float | None,
    autocast: torch.autocast,
) -> Tensor:
    with autocast:
        logits = head(hidden if norm is None else norm(hidden))
        logits = logits if divisor == 1 else logits / divisor
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        # Of a model under mixed precision outputs are fp32: accelerate sees to those it finds.
        return logits.float() if torch.is_autocast_enabled(hidden.device.type) else logits


class StandIn:
    """``function`` in place of a module's forward, for one call."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor], Tensor]):
        self._attributes, self._function = vars(module), function
        self._before = self._attributes.get("forward")
        self._attributes["forward"] = self

    def __call__(self, hidden: Tensor) -> Tensor:
        self.remove()  # the function calls the module's own
        return self._function(hidden)

    def remove(self) -> None:
        if self._attributes.get("forward") is not self:
            return
        del self._attributes["forward"]
        if self._before is not None:
            self._attributes["forward"] = self._before
