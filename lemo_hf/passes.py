"""Hooks on the causal LM: they see each batch come in, and the loss go out.

In a sparse pass the loss belongs to one of three: the model itself, then `OwnLoss` takes its place
and no ``[B, T, V]`` logits are made; a forward or loss function that somebody put on the instance
or its class (Liger, TRL, cut cross-entropy); or a function of the logits outside the model
(``compute_loss_func``, label smoothing, a `compute_loss` of the user's). The last two keep their
loss. They are given labels from which the targets of eliminated tokens are struck once the last
sparse layer has run. A pass in training mode without labels is sparse in a training step alone.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo_hf.checks import check_call
from lemo_hf.compiled import stock_call
from lemo_hf.config import UNITS, LeMoConfig
from lemo_hf.families import Family
from lemo_hf.kernels.launch import sharded
from lemo_hf.labels import Labels, StepLabels
from lemo_hf.loss import shifted
from lemo_hf.memory import fitting_level, free_bytes, local_bytes
from lemo_hf.offload import HostMemory
from lemo_hf.out_of_memory import said_what_helps
from lemo_hf.own_loss import OwnLoss, makes_plain_loss, returns_tuple
from lemo_hf.row_counts import RowCounts
from lemo_hf.selection import LayerRows
from lemo_hf.sequence_checks import (
    check_sequence_call,
    check_sequence_loss,
    check_sequence_model,
)
from lemo_hf.sequence_parallel import Shards, sequence_group
from lemo_hf.sparse_pass import Seen, SparsePass

logger = logging.getLogger(__name__)

PLAIN_UNLABELLED = (
    "LeMo: a pass in training mode without labels is the plain model's, all tokens in every layer. "
    "If it trains, give the model its labels, or call LeMo.begin_step before each step."
)
SPARSE_UNLABELLED = (
    "LeMo: a training step gives the model no labels, so that nothing says which blocks hold "
    "answers, and its loss may ask tokens that were left out. Give the model its labels; for a "
    "loss of your own use LeMoTrainer, where inputs['labels'] are those of kept tokens."
)
MOST_SHAPES = 1024  # whose levels of recomputation are remembered


class Passes:
    """The forward passes of one model: the one under way, and counts of those that ended.

    Attributes:
        resting: A trainer put LeMo on and does not train now: all passes are the plain model's. In
            a loop of one's own it is False.
        current: The sparse pass under way, or None.
        global_step: Optimizer steps done, int64 scalar tensor or int.
        rows: Counts of the rows of the next pass, where the host knows them already.
        retention: What rows keep in passes from now on, whatever the config says; None: what it
            says.
        asked: A training step is under way, whose passes are sparse without labels too.
        expected: Labels of the step, which a loss outside the model may take.
        plain: The pass under way is the stock model's, though in training mode.
        counts: Tokens that were no padding, and kept token-layers of attention and MLP.
        kept_blocks: Of the last sparse pass: ``[B, N]`` bool by ``(layer, "attention" or "mlp")``.
        dtype: Of products in the last sparse pass.
        first: Counts of the rows of the first sparse pass that is none of the finish, and what it
            kept of each; None before.
        deliver: Is given what a pass has kept; `add`, unless it is not to be counted here.
        listeners: Are given the same, when it has been counted.
        last: The last sparse layer.
        host: Where layers store what they would keep on the device, or None.
        group: The processes that share each sequence, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: LeMoConfig,
        family: Family,
        last: nn.Module,
        host: HostMemory | None,
    ):
        self.config, self.family, self.last, self.host = config, family, last, host
        self._head = model.get_output_embeddings
        self._parameters, self._model_config = model.parameters, model.config
        self._layers = list(cast(nn.ModuleList, model.get_submodule(family.layers)))
        if config.sequence_parallel_size > 1:
            check_sequence_model(config, model, family)
        self.group = sequence_group(config.sequence_parallel_size)
        self.resting = False
        self.current: SparsePass | None = None
        self.global_step: Tensor | int = 0
        self.rows: list[RowCounts] | None = None
        self.retention: float | None = None
        self.asked = self.plain = False
        self.expected: StepLabels | None = None
        self.first: tuple[list[RowCounts], list[int]] | None = None
        self.counts: dict[str, Any] = {}
        self.kept_blocks: dict[tuple[int, str], Tensor] = {}
        self.dtype: torch.dtype | None = None
        self.deliver: Callable[[Seen], None] = self.add
        self.listeners: list[Callable[[Seen], None]] = []
        self.reset_counts()
        self._warned = self._begun = False
        self._levels: dict[tuple, str] = {}
        self._said_unlabelled = False
        self._promised: Labels | None = None
        self._own: OwnLoss | None = None
        self._for_this_pass: list = []
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            # Before other hooks, which may look at the loss.
            model.register_forward_hook(self._after, always_call=True, prepend=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        self.drop()
        for hook in self._hooks:
            hook.remove()

    def run(self, train: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call ``model``, which is in training mode, by ``train``."""
        if self.resting:
            train = stock_call
        try:
            with self.said_what_helps():
                return train(model, *args, **kwargs)
        finally:
            self.drop()  # Ctrl-C skips `_after`, and what it left would be the next pass's

    def said_what_helps(self) -> AbstractContextManager[None]:
        """Around what may run out of memory, see `out_of_memory.said_what_helps`."""
        return said_what_helps(self.config, self._layers, finish=self.retention is not None)

    def drop(self) -> None:
        """Drop what is left of a pass."""
        while self._for_this_pass:
            self._for_this_pass.pop().remove()
        if self._own is not None:
            self._own.remove()
        self.current = self._own = self._promised = None
        self.plain = False

    def reset_counts(self) -> None:
        """Start the counts anew."""
        self.counts = {"real": 0, "attention": 0, "mlp": 0}

    def add(self, seen: Seen) -> None:
        """Count a pass that ended."""
        self.kept_blocks = seen.kept_blocks
        self.counts["real"] += seen.real_tokens
        for name, count in seen.kept_tokens.items():
            self.counts[name] = self.counts[name] + count
        for listener in self.listeners:
            listener(seen)

    def promise(self, tensor: Tensor, num_items: Tensor | int | None) -> Labels:
        """Announce labels of a loss outside the model, which the next pass is not given."""
        self._promised = Labels.copy_of(tensor, num_items)
        return self._promised

    def expect(self, tensor: Tensor, num_items: Any) -> Labels:
        """Announce labels that any pass of the step may take, given them or not.

        ``num_items``, a tensor or None, may be changed.
        """
        whole = Labels.copy_of(tensor, num_items)
        self.expected = StepLabels("labels", tensor.clone(), num_items, whole=whole)
        return self.expected

    @property
    def promised(self) -> bool:
        """Whether the loss of the next pass may be made outside the model."""
        return self._promised is not None or self.expected is not None

    def count_rows(self, input_ids: Tensor, mask: Tensor | None, labels: Tensor) -> list[RowCounts]:
        """Counts of a batch before its pass; the host waits for them.

        Args:
            input_ids: ``[B, T]``.
            mask: ``[B, T]`` (1 = token, 0 = padding), or None.
            labels: ``[B, T]``, as the model is given them.
        """
        batch, tokens = input_ids.shape
        targets = shifted(labels)
        sparse_pass = SparsePass(
            self.config,
            (batch, tokens),
            input_ids.device,
            attention_mask=mask,
            targets=targets,
            vocabulary=self._model_config.vocab_size,
        )
        sparse_pass.check_labels(targets)
        return sparse_pass.rows

    def _before(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        promised, self._promised = self._promised, None
        self.plain = False
        if args:
            kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        if not model.training or kwargs.get("past_key_values") is not None:
            return (), kwargs
        if self.resting:
            self.plain = True
            return (), kwargs
        ids = kwargs.get("input_ids")
        main = kwargs.get("inputs_embeds") if ids is None else ids
        if main is None:
            return (), kwargs  # the model's own error is as good
        if self.expected is not None:
            kwargs = self.expected.restored(kwargs)
        if promised is not None:
            promised.fit(main)
        given, labels = Labels.in_call(kwargs), promised
        if promised is None and self.expected is not None and self.expected.fit(main):
            promised, labels = self.expected, self.expected.whole
        labels = given or labels
        odd = kwargs.get("fused_lm_head") or self.group is not None  # which are refused below
        refused = odd and torch.is_grad_enabled()
        if labels is None and not refused and not self._asked_without_labels():
            self.plain = True
            return (), kwargs
        check_call(model, kwargs, promised is not None)
        kwargs["use_cache"] = False  # with a cache the layers would run dense
        own = given is not None and makes_plain_loss(model, kwargs)
        own = own and not returns_tuple(model, kwargs)
        if self.expected is not None and sharded(self._head()) and self.group is None:
            own = False  # its logits may be asked for, which cannot be made after the pass
        shards = None
        if self.group is not None:
            check_sequence_call(self.config, self._layers, self.family, kwargs, main)
            check_sequence_loss(self.config, labels is not None, own)
            kwargs["attention_mask"] = None
            shards = Shards(self.group, main.shape[1], self.config.block_size)
        self.current = sparse_pass = SparsePass(
            self.config,
            tuple(main.shape[:2]),
            main.device,
            input_ids=ids,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=_position_ids(kwargs, main.shape[1]),
            targets=None if labels is None else labels.targets(),
            vocabulary=model.config.vocab_size,
            global_step=self.global_step,
            score_always=sharded(self.last),
            shards=shards,
            rows=self.rows,
            retention=self.retention,
        )
        if shards is not None:
            _take_shard(shards, kwargs, main)
        others = [] if promised is None else [promised]
        if own:
            assert given is not None  # or there would be no loss of the model's own
            for name in ("labels", "shift_labels"):
                kwargs.pop(name, None)
            items = given.num_items
            self._own = OwnLoss(model, self.family, sparse_pass, given.targets(), items)
        elif given is not None:
            kwargs[given.name] = given.tensor
            if given.num_items is not None:
                kwargs["num_items_in_batch"] = given.num_items
            others.append(given)
        if others and (self.config.supervise == "kept" or sparse_pass.valid is not None):

            def strike(*_: Any) -> None:
                for labels in others:
                    labels.strike(sparse_pass)

            self._for_this_pass.append(self.last.register_forward_hook(strike))
        return (), kwargs

    def _asked_without_labels(self) -> bool:
        """Whether a pass without labels is one of a training step; says once what follows."""
        if not torch.is_grad_enabled():
            return False  # generation, a look at the logits
        if not self._said_unlabelled:
            self._said_unlabelled = True
            logger.warning("%s Said once.", SPARSE_UNLABELLED if self.asked else PLAIN_UNLABELLED)
        return self.asked

    def fitting_level(self, layer: nn.Module, x: Tensor) -> str:
        """What all layers that follow gradient checkpointing compute again: one of `UNITS`.

        Decided by the first that asks, once for a shape and as many rows as layers keep.
        """
        sparse_pass = self.current
        assert sparse_pass is not None  # a layer of a sparse pass asks
        if sparse_pass.level is None:
            rows = tuple(sparse_pass.stored_rows(len(self._layers)))
            sparse_pass.level = self._levels.get((x.shape, rows))
            if sparse_pass.level is None:
                sparse_pass.level = self._fitting_level(layer, x, rows)
                if sparse_pass.level not in self._levels.values():
                    logger.info(
                        "recompute=%r is what fits beside batches of %d x %d tokens",
                        sparse_pass.level,
                        sparse_pass.batch,
                        sparse_pass.tokens,
                    )
                if len(self._levels) == MOST_SHAPES:
                    self._levels.clear()
                self._levels[x.shape, rows] = sparse_pass.level
        return sparse_pass.level

    def _fitting_level(self, layer: nn.Module, x: Tensor, rows: Sequence[LayerRows]) -> str:
        if x.device.type != "cuda":
            return UNITS[0]
        attention = getattr(layer, self.family.attention)
        head = getattr(attention, "head_dim", 0)
        width = attention.config.num_attention_heads * head or x.shape[2]
        trained = sum(local_bytes(p) for p in self._parameters() if p.requires_grad)
        slabs = 0 if self.host is None else self.host.most
        room = free_bytes(x.device)
        return fitting_level(rows, x.shape, width, x.element_size(), trained, slabs, room)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """End the pass (after an error too), count it, and hand our loss over."""
        sparse_pass, own = self.current, self._own
        self.drop()
        if sparse_pass is None or output is None:
            return output
        if sparse_pass.exceeded and not self._warned:
            logger.warning(
                "%s. Said once; the logged retention shows how often.", sparse_pass.exceeded
            )
            self._warned = True
        if not self._begun and sparse_pass.retention is None:  # a run may go on within its finish
            self.first, self._begun = (sparse_pass.rows, sparse_pass.row_slots), True
        self.deliver(sparse_pass.seen())
        return output if own is None else own.give(output)


def _take_shard(shards: Shards, kwargs: dict[str, Any], main: Tensor) -> None:
    """Leave this process's shard of the call; the positions stay those of the whole sequence."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            kwargs[name] = shards.part(kwargs[name])
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = torch.arange(main.shape[1], device=main.device)[None]


def _position_ids(kwargs: dict[str, Any], tokens: int) -> Tensor | None:
    """Position ids as the caller gave them, or as its document boundaries imply."""
    bounds = kwargs.get("cu_seq_lens_q")
    if kwargs.get("position_ids") is not None or bounds is None:
        return kwargs.get("position_ids")
    positions = torch.arange(tokens, device=bounds.device)
    starts = bounds[torch.searchsorted(bounds, positions.to(bounds.dtype), right=True) - 1]
    return (positions - starts)[None]
