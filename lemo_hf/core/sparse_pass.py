"""One forward pass: what its layers keep of the batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lemo_hf.batch.budget import Budget
from lemo_hf.batch.facts import BatchFacts
from lemo_hf.batch.pairs import pair_scores, partners
from lemo_hf.batch.selection import (
    KeptSet,
    LayerRows,
    blocks_above,
    keep_blocks,
    kept_set,
)
from lemo_hf.batch.tally import Seen
from lemo_hf.config import KeepRule, LeMoConfig
from lemo_hf.core.router_load import RouterLoad
from lemo_hf.parallel.sequence_parallel import Shards, Share


class SparsePass(BatchFacts):
    """One forward pass: the facts of its batch, and the kept sets chosen so far.

    Args:
        config: The user's settings.
        shape: Rows and tokens of the batch, ``(B, T)``.
        device: Device of the batch.
        global_step: Number of optimizer steps done, int64 scalar tensor or int; draws by chance
            differ from step to step.
        score_always: Whether blocks are scored even if there is nothing to choose: other processes
            may have to score theirs, and scoring gathers parameters of which each holds a part.
        shards: How processes share the sequence, or None. All else here is about whole sequences.
        retention: Share that rows keep instead of the config's, see `Budget`; or None.
        load: Counts of the routers' choices, if the loss has a term for them; or None.
        leader: Pass over the same batch whose kept sets this one takes; None: it chooses its own.
        **facts: What is known of the batch, see `BatchFacts`: ``input_ids``, ``attention_mask``,
            ``position_ids``, ``targets``, ``vocabulary``, ``rows``, ``pairs`` and ``images``.
    """

    # The loss reads the stream itself, so that its gradient may be updated in place as it comes.
    owns_gradient = False

    def __init__(
        self,
        config: LeMoConfig,
        shape: tuple[int, int],
        device: torch.device,
        *,
        global_step: Tensor | int = 0,
        score_always: bool = False,
        shards: Shards | None = None,
        retention: float | None = None,
        load: RouterLoad | None = None,
        leader: "SparsePass | None" = None,
        **facts: Any,
    ):
        super().__init__(config.block_size, shape, device, **facts)
        self.config = config
        self.global_step = global_step
        self.score_always = score_always
        self.shards = shards
        self.load = load
        self.budget = Budget(config, retention)
        self.agreed: dict[str, KeptSet] = {}
        self.chosen: dict[tuple[int, str], KeptSet] = {}
        self._given = {} if leader is None else _anew(leader.chosen)
        self.times_kept = torch.zeros(shape, dtype=torch.int32, device=device)
        self.kept_tokens: dict[str, Tensor | int] = {"attention": 0, "mlp": 0}
        self.kept_blocks: dict[tuple[int, str], Tensor] = {}
        # Fewest and most tokens of each row that a layer keeps, by sublayer.
        self.row_slots: dict[str, list[tuple[int, int]]] = {}
        self.level: str | None = None  # of recomputation, set when the first layer asks
        self.ran: set[int] = set()  # indices of layers
        self.wrapped: frozenset[int] = frozenset()  # those of which others may read the input
        self.exceeded: str | None = None  # why a row keeps more than its budget

    @cached_property
    def everything(self) -> KeptSet:
        """All positions, for a layer that is dense."""
        index = torch.arange(self.tokens, device=self.device).expand(self.batch, -1).contiguous()
        return KeptSet(index, None, self.row_tokens.sum(), self.real, whole=True, cache={})

    def seen(self) -> Seen:
        """What layers have kept, once all have chosen."""
        return Seen(self.real_tokens, self.real, self.kept_tokens, self.kept_blocks)

    def counted(self, kept: KeptSet) -> Tensor | None:
        """Slots of ``kept`` that hold a token, ``[B * K]`` bool; None if all of them do."""
        found = kept.slot_mask
        if self.valid is not None:
            real = self.valid.gather(1, kept.index)
            found = real if found is None else found & real
        return None if found is None else found.flatten()

    def share(self, kept: KeptSet) -> Share | None:
        """Who works on which rows of ``kept``; None where no other process does."""
        return None if self.shards is None else self.shards.share(kept)

    def choose(
        self,
        layer_index: int,
        sublayer: str,
        rule: KeepRule,
        score: Callable[[], Tensor],
        shared: bool = False,
    ) -> KeptSet:
        """The rows that ``sublayer`` ("attention" or "mlp") of a layer keeps.

        Args:
            layer_index: Of the layer that asks.
            sublayer: Layers that agree look for the set of this name first.
            rule: How many of each row's blocks.
            score: Called only if something is left to choose (but see ``score_always``):
                ``[B, N]`` block scores.
            shared: The MLP keeps the same rows, and is counted with them.
        """
        kept = self._given.get((layer_index, sublayer), self.agreed.get(sublayer))
        if kept is None:
            kept, slots = self._choose(rule, score)
            others = self.row_slots.get(sublayer, [(n, n) for n in slots])
            self.row_slots[sublayer] = [
                (min(low, n), max(high, n)) for (low, high), n in zip(others, slots, strict=True)
            ]
            if self.config.agree_across_layers:
                self.agreed[sublayer] = kept
        if self.pairs:  # or a layer's set, and what was gathered by it, would outlive the layer
            self.chosen[layer_index, sublayer] = kept
        for name in ("attention", "mlp") if shared else (sublayer,):
            self.kept_tokens[name] = self.kept_tokens[name] + kept.kept_tokens
            self.kept_blocks[layer_index, name] = kept.blocks
        return kept

    def stored_rows(self, num_layers: int) -> Iterator[LayerRows]:
        """Of each layer of the model, see `Budget.stored_rows`."""
        processes = 1 if self.shards is None else self.shards.group.size
        return self.budget.stored_rows(num_layers, self, processes)

    def _choose(self, rule: KeepRule, score: Callable[[], Tensor]) -> tuple[KeptSet, list[int]]:
        """The kept set, and how many tokens it has of each row."""
        if self.pairs:
            self.check_pairs()
        shares = self.budget.shares(rule, self)
        if shares is not None:
            blocks, slots, exact = self._best(shares, score)
            tokens = self.tokens_of(blocks)
        else:
            assert rule.threshold is not None  # one of the two is set
            blocks = self.real
            if rule.threshold > 0:
                blocks = blocks_above(
                    score(),
                    self.real,
                    self.required,
                    rule.threshold,
                    self.block_documents,
                    self.groups,
                )
                if self.pairs:
                    blocks = blocks | (partners(blocks) & self.prompt)
            tokens = self.tokens_of(blocks)
            # The scores fix how many slots there are, so the host waits for them at each choice.
            slots, exact = tokens.sum(1).tolist(), True
        self.times_kept += tokens
        num_slots = max(1, *slots)
        exact &= all(n == num_slots for n in slots)
        shared = self.config.agree_across_layers
        return kept_set(tokens, blocks, num_slots, exact, shared), slots

    def _best(
        self, shares: list[float], score: Callable[[], Tensor]
    ) -> tuple[Tensor, list[int], bool]:
        """The best share of blocks ``[B, N]``, each row's slots, and whether it fills them all."""
        budgets, slots = self.budget.blocks(shares, self), self.budget.slots(shares, self)
        self.exceeded = self.budget.excess(shares, self) or self.exceeded
        everything = all(k == row.blocks for k, row in zip(budgets, self.rows, strict=True))
        if self.budget.is_everything(shares) or (everything and not self.score_always):
            blocks = self.real
        else:
            scores = pair_scores(score(), self.prompt) if self.pairs else score()
            blocks = keep_blocks(
                scores,
                self.real,
                self.required,
                self._column(budgets),
                self.block_documents,
                self.groups,
            )
        if self.groups is not None:  # a row may keep less
            return blocks, slots, False
        exact = all(row.tokens == row.most_tokens(row.blocks, self.block_size) for row in self.rows)
        return blocks, slots, exact

    def _column(self, numbers: list[int]) -> Tensor | int:
        """``[B, 1]`` on the device, or the number that all of them are."""
        if len(set(numbers)) == 1:
            return numbers[0]
        # Filled where they are needed: nothing is copied, which the host or a graph would wait for.
        return torch.stack([torch.full((1,), n, device=self.device) for n in numbers])


def _anew(chosen: dict[tuple[int, str], KeptSet]) -> dict[tuple[int, str], KeptSet]:
    """The same sets with nothing gathered by them: another model may have another dtype."""
    sets = {id(x): replace(x, cache=None if x.cache is None else {}) for x in chosen.values()}
    return {key: sets[id(x)] for key, x in chosen.items()}
