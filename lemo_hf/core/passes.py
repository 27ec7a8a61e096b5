"""Hooks on the causal LM, which see each batch and its loss.

The loss of a sparse pass is made in one of three places. The model makes it: then `OwnLoss`
replaces it, and no ``[B, T, V]`` logits are made. A forward or loss function that was put on the
instance or its class makes it (Liger, TRL, cut cross-entropy). Or a function of the logits outside
the model makes it (``compute_loss_func``, label smoothing, a user's `compute_loss`). The last two
keep their loss, and get labels in which those of tokens that were left out are struck once the last
sparse layer has run. A pass in training mode without labels is sparse only in a training step.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo_hf.batch.facts import position_ids_of
from lemo_hf.batch.row_counts import RowCounts
from lemo_hf.batch.tally import Seen, Tally
from lemo_hf.config import LeMoConfig
from lemo_hf.core.checks import asks_for_router_logits, check_call, check_router_loss
from lemo_hf.core.compiled import stock_call
from lemo_hf.core.family import Family
from lemo_hf.core.fp8_switch import Fp8Switch
from lemo_hf.core.images import images_of
from lemo_hf.core.label_rows import norm_label_rows
from lemo_hf.core.labels import AnnouncedLabels, Labels
from lemo_hf.core.layer_places import check_ran, wrapped_layers
from lemo_hf.core.levels import Levels
from lemo_hf.core.own_loss import OwnLoss, makes_plain_loss, returns_tuple
from lemo_hf.core.pair_sets import PairSets
from lemo_hf.core.router_load import RouterLoad
from lemo_hf.core.sequence_checks import (
    check_sequence_call,
    check_sequence_loss,
)
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.launch import settle, sharded
from lemo_hf.memory.offload import HostMemory
from lemo_hf.memory.out_of_memory import said_what_helps
from lemo_hf.parallel.sequence_parallel import Shards, sequence_group

logger = logging.getLogger(__name__)

PLAIN_UNLABELLED = (
    "LeMo: a pass in training mode without labels is the plain model's, all tokens in every layer. "
    "If it trains, give the model its labels, or call LeMo.begin_step before each step."
)
SPARSE_UNLABELLED = (
    "LeMo: a training step gives the model no labels, so LeMo does not know which blocks hold "
    "answers, and the loss may cover tokens that were left out. Give the model its labels; for a "
    "loss of your own use LeMoTrainer, where inputs['labels'] are those of kept tokens."
)

CACHED = (
    "LeMo: a training pass with past_key_values and labels is the plain model's, all tokens in "
    "every layer. This is said once."
)


class Passes:
    """The forward passes of one model: the one under way, and counts of what earlier ones kept.

    Attributes:
        model: The causal LM.
        resting: Whether a trainer put LeMo on the model and does not train now, so that all passes
            are the plain model's. False in a training loop of one's own.
        current: Sparse pass under way, or None.
        plain: Whether the pass under way is the stock model's, though in training mode.
        global_step: Number of optimizer steps done, int64 scalar tensor or int; of passes where
            nobody tells of steps.
        told: Whether somebody does, see `LeMo.begin_step`.
        retention: Share of the blocks that rows keep in the finish, instead of the config's; None
            outside the finish.
        fp8: Switch of products that may be in FP8, or None.
        in_fp8: Whether they are.
        asked: Whether a training step is under way, whose passes are sparse without labels too.
        announced: Labels of losses outside the model.
        pairs: Kept sets that passes over pairs share with those of their reference; None without
            pairs.
        rows: Counts of the rows of the next pass, if the host knows them already.
        tally: Counts of what passes that have ended kept.
        deliver: Function that gets what a pass has kept; `Tally.add`, unless it is not to be
            counted.
        dtype: Dtype of products in the last sparse pass.
        last: The last sparse layer.
        host: Pinned host memory for what layers store, or None.
        levels: Levels of recomputation of layers that follow gradient checkpointing.
        group: The processes that share each sequence, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: LeMoConfig,
        family: Family,
        last: nn.Module,
        host: HostMemory | None,
        fp8: Fp8Switch | None = None,
    ):
        self.config, self.family, self.last, self.host = config, family, last, host
        self.fp8, self.in_fp8 = fp8, fp8 is not None
        self.model, self._head = model, model.get_output_embeddings
        self._layers = list(cast(nn.ModuleList, model.get_submodule(family.layers)))
        self.levels = Levels(model.parameters, family, self._layers, host)
        self.group = sequence_group(config.sequence_parallel_size)
        self.resting = self.plain = self.asked = self.told = False
        self.current: SparsePass | None = None
        self.global_step: Tensor | int = 0
        self.rows: list[RowCounts] | None = None
        self.retention: float | None = None
        self.pairs: PairSets | None = None
        self.announced = AnnouncedLabels()
        self.tally = Tally()
        self.deliver: Callable[[Seen], None] = self.tally.add
        self.dtype: torch.dtype | None = None
        self._said: set[str] = set()
        self._own: OwnLoss | None = None
        self._for_this_pass: list = []
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            # Before other hooks, which may look at the loss.
            model.register_forward_hook(self._after, always_call=True, prepend=True),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        self.drop()
        for hook in self._hooks:
            hook.remove()

    def run(self, train: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call ``model``, which is in training mode, through ``train``."""
        if self.resting:
            train = stock_call
        elif self.fp8 is not None:
            self.fp8.look()
        try:
            with self.said_what_helps():
                return train(model, *args, **kwargs)
        finally:
            self.drop()  # Ctrl-C skips `_after`, and what it left would be the next pass's

    def said_what_helps(self) -> AbstractContextManager[None]:
        """Context for code that may run out of memory, see `out_of_memory.said_what_helps`."""
        return said_what_helps(self.config, self._layers, finish=self.retention is not None)

    def drop(self) -> None:
        """Drop what is left of a pass."""
        while self._for_this_pass:
            self._for_this_pass.pop().remove()
        if self._own is not None:
            self._own.remove()
        self.current = self._own = self.announced.for_next = None
        self.plain = False

    def _before(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Begin the pass. Returns the arguments to call the model with."""
        promised, self.announced.for_next = self.announced.for_next, None
        self.plain = False
        if args:
            kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        pairs = self.pairs or PairSets()
        of_reference = pairs.are_asked()
        if not (model.training or of_reference):
            return (), kwargs
        if kwargs.get("past_key_values") is not None:
            if torch.is_grad_enabled() and Labels.in_call(kwargs) is not None:
                self._say_once("cached", CACHED)
            self.plain = True
            return (), kwargs
        if self.resting and not of_reference:
            self.plain = True
            return (), kwargs
        ids = kwargs.get("input_ids")
        main = kwargs.get("inputs_embeds") if ids is None else ids
        if main is None:
            return (), kwargs  # the model's own error is as good
        kwargs = self.announced.restored(kwargs)
        given = Labels.in_call(kwargs)
        outside, whole = self.announced.of_pass(promised, main)
        labels = given or whole
        odd = kwargs.get("fused_lm_head") or self.group is not None  # which are refused below
        refused = odd and torch.is_grad_enabled()
        if labels is None and not refused and not self._asked_without_labels():
            self.plain = True
            return (), kwargs
        check_call(model, kwargs, outside is not None or self.pairs is not None)
        wrapped = wrapped_layers(model, self.family, self._layers)
        images = images_of(model, kwargs, pairs=self.pairs is not None)
        kwargs["use_cache"] = False  # with a cache the layers would run dense
        own = self._makes_own_loss(model, kwargs, given)
        load = None
        if asks_for_router_logits(model, kwargs):
            check_router_loss(model, own, self.config)
            load = RouterLoad(model)
            kwargs["output_router_logits"] = False
        shards = None
        if self.group is not None:
            check_sequence_call(self.config, self._layers, self.family, kwargs, main)
            check_sequence_loss(self.config, labels is not None, own)
            kwargs["attention_mask"] = None
            shards = Shards(self.group, main.shape[1], self.config.block_size)
        leader = pairs.latest if of_reference else None
        settle(main.device.type)
        self.current = SparsePass(
            self.config,
            tuple(main.shape[:2]),
            main.device,
            input_ids=ids,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=position_ids_of(kwargs, main.shape[1]),
            targets=None if labels is None else labels.targets(),
            vocabulary=model.config.get_text_config().vocab_size,
            global_step=0 if pairs.fixed else self.global_step,
            score_always=sharded(self.last),
            shards=shards,
            rows=leader.rows if leader is not None else self.rows,
            retention=self.retention,
            load=load,
            leader=leader,
            pairs=self.pairs is not None,
            images=images,
        )
        self.current.wrapped = wrapped
        if shards is not None:
            kwargs = shards.take(kwargs)
        if self.pairs is not None and self.current.valid is not None:
            # Padding on the right, see `check_pairs`, is seen by no token: causal attention needs
            # no mask, which would be T x T and keep the fastest kernels away.
            kwargs["attention_mask"] = None
        others = [] if outside is None else [outside]
        if own:
            assert given is not None  # or there would be no loss of the model's own
            for name in ("labels", "shift_labels"):
                kwargs.pop(name, None)
            targets, items = given.targets(), given.num_items
            self._own = OwnLoss(model, self.family, self.current, targets, items)
        elif given is not None:
            kwargs[given.name] = given.tensor
            if given.num_items is not None:
                kwargs["num_items_in_batch"] = given.num_items
            others.append(given)
            if self.pairs is not None and kwargs.get("fused_lm_head"):  # by TRL: reads no others
                self._norm_label_rows(model, given)
        self._strike_later(self.current, others)
        return (), kwargs

    def _norm_label_rows(self, model: PreTrainedModel, labels: Labels) -> None:
        assert self.current is not None  # it is about to run
        norm = norm_label_rows(model, self.family, self.current, labels.targets())
        if norm is not None:
            self._for_this_pass.append(norm)

    def _makes_own_loss(
        self, model: PreTrainedModel, kwargs: dict[str, Any], given: Labels | None
    ) -> bool:
        """Whether `OwnLoss` replaces the loss that the model would make."""
        if given is None or not makes_plain_loss(model, kwargs) or returns_tuple(model, kwargs):
            return False
        if self.announced.for_step is None or self.group is not None:
            return True
        return not sharded(self._head())  # whose logits cannot be made after the pass

    def _strike_later(self, current: SparsePass, others: Sequence[Labels]) -> None:
        """Strike labels of other losses once the last sparse layer has run."""
        if not others or (self.config.supervise == "all" and current.valid is None):
            return

        def strike(*_: Any) -> None:
            for labels in others:
                labels.strike(current)

        self._for_this_pass.append(self.last.register_forward_hook(strike))

    def _asked_without_labels(self) -> bool:
        """Whether a pass without labels belongs to a training step; warns once of what follows."""
        if not torch.is_grad_enabled():
            return False  # generation, a look at the logits
        text = SPARSE_UNLABELLED if self.asked else PLAIN_UNLABELLED
        self._say_once("unlabelled", f"{text} This is said once.")
        return self.asked

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """End the pass (also after an error), count it, and put LeMo's loss into the output."""
        ended, own = self.current, self._own
        self.drop()
        if ended is None or output is None:
            return output
        check_ran(ended.ran, self._layers)
        if self.pairs is None or torch.is_grad_enabled():  # a reference's pass trains nothing
            self._count(ended)
        return output if own is None else own.give(output)

    def _count(self, ended: SparsePass) -> None:
        """Count a pass that trains, and log its warnings."""
        if self.pairs is not None:
            self.pairs.latest = ended
        if ended.exceeded:
            said = f"{ended.exceeded}. This is said once; the logged retention shows how often."
            self._say_once("exceeded", said)
        self._number_next()
        if ended.budget.retention is None:  # a run may go on within its finish
            self.tally.note_first(ended.rows, ended.row_slots, ended.documents)
        self.deliver(ended.seen())

    def count_replay(self, seen: Seen) -> None:
        """Count a pass that a CUDA graph has replayed."""
        self.tally.add(seen.clone())
        self._number_next()

    def _number_next(self) -> None:
        """A pass that trains has ended. If nobody says which step comes, it has the next number, or
        chance would draw the same blocks again."""
        if not self.told and isinstance(self.global_step, int):
            self.global_step += 1

    def _say_once(self, subject: str, message: str) -> None:
        """Warn once for each subject."""
        if subject not in self._said:
            self._said.add(subject)
            logger.warning("%s", message)
