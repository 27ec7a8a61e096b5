"""One forward pass: what its layers keep of the batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lemo_hf.batch_facts import BatchFacts
from lemo_hf.config import KeepRule, LeMoConfig
from lemo_hf.selection import (
    KeptSet,
    LayerRows,
    blocks_above,
    keep_blocks,
    kept_set,
    num_kept_blocks,
)
from lemo_hf.sequence_parallel import Shards, Share


@dataclass(frozen=True)
class Seen:
    """What a pass that ended has kept.

    Attributes:
        real_tokens: Of the batch that are no padding.
        real_blocks: ``[B, N]`` bool: blocks with such tokens.
        kept_tokens: Token-layers of "attention" and "mlp", int64 scalars.
        kept_blocks: ``[B, N]`` bool by ``(layer, "attention" or "mlp")``.
    """

    real_tokens: int
    real_blocks: Tensor
    kept_tokens: dict[str, Tensor | int]
    kept_blocks: dict[tuple[int, str], Tensor]

    def clone(self) -> "Seen":
        """The same in other memory; sets that layers share are one there too."""
        sets = {id(blocks): blocks.clone() for blocks in self.kept_blocks.values()}
        return Seen(
            self.real_tokens,
            self.real_blocks.clone(),
            {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.kept_tokens.items()},
            {key: sets[id(blocks)] for key, blocks in self.kept_blocks.items()},
        )


class SparsePass(BatchFacts):
    """One forward pass: the facts of its batch, and the kept sets chosen so far.

    Args:
        config: The user's choice.
        shape: ``(B, T)``.
        device: Of the batch.
        global_step: Optimizer steps done, int64 scalar tensor or int; varies the random policy.
        score_always: Score blocks even where there is nothing to choose, as other processes may
            have to, and scoring gathers parameters that all of them hold parts of.
        shards: How processes share the sequence, if they do; all else here is of the whole of it.
        retention: What rows keep in this pass, whatever the config says: the finish of a run. With
            policy ``"auto"`` and no ``dense_finish`` of the user's, rows that ask are spared.
        **facts: Of the batch: ``input_ids``, ``attention_mask``, ``position_ids``, ``targets``,
            ``vocabulary`` and ``rows``, see `BatchFacts`.
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
        **facts: Any,
    ):
        super().__init__(config.block_size, shape, device, **facts)
        self.config = config
        self.global_step = global_step
        self.score_always = score_always
        self.shards = shards
        self.retention = retention
        self.agreed: dict[str, KeptSet] = {}
        self.times_kept = torch.zeros(shape, dtype=torch.int32, device=device)
        self.kept_tokens: dict[str, Tensor | int] = {"attention": 0, "mlp": 0}
        self.kept_blocks: dict[tuple[int, str], Tensor] = {}
        self.row_slots: list[int] = []  # tokens that the latest choice keeps of each row
        self.level: str | None = None  # of recomputation, once a layer asks
        self.exceeded: str | None = None  # why a row keeps more than its budget

    @cached_property
    def everything(self) -> KeptSet:
        """All positions, for a layer that is dense."""
        index = torch.arange(self.tokens, device=self.device).expand(self.batch, -1).contiguous()
        return KeptSet(index, None, self._tokens.sum(), self.real, whole=True, cache={})

    def seen(self) -> Seen:
        """What layers have kept, once all have chosen."""
        return Seen(self.real_tokens, self.real, self.kept_tokens, self.kept_blocks)

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
        kept = self.agreed.get(sublayer)
        if kept is None:
            kept = self._choose(rule, score)
            if self.config.agree_across_layers:
                self.agreed[sublayer] = kept
        for name in ("attention", "mlp") if shared else (sublayer,):
            self.kept_tokens[name] = self.kept_tokens[name] + kept.kept_tokens
            self.kept_blocks[layer_index, name] = kept.blocks
        return kept

    def stored_rows(self, num_layers: int) -> Iterator[LayerRows]:
        """Of each layer of the model, in the whole batch; this process's, where several share it.

        Known before a layer has chosen. Layers that thresholds choose for may keep every row.
        """
        for rule in self.config.layer_rules(num_layers):
            attention, mlp = (None, None) if rule is None else rule
            yield self._rows_of(attention), None if mlp is None else self._rows_of(mlp)

    def _rows_of(self, rule: KeepRule | None) -> int:
        shares = None if rule is None else self._shares(rule)
        if shares is None:
            rows = self.batch * self.tokens
        else:
            rows = self.batch * max(1, *self._slots(shares))
        return rows if self.shards is None else -(-rows // self.shards.group.size)

    def _shares(self, rule: KeepRule) -> list[float] | None:
        """What each row keeps by ``rule`` in this pass; None where a threshold decides."""
        if self.retention is None:
            return None if rule.retention is None else [rule.retention] * self.batch
        if not self._spares_rows:
            return [self.retention] * self.batch
        assert rule.retention is not None  # the policy of thresholds is never "auto"
        return [rule.retention if row.label_blocks else self.retention for row in self.rows]

    @property
    def _spares_rows(self) -> bool:
        """A finish that the user did not ask for holds for rows that are labelled throughout."""
        return self.config.policy == "auto" and self.config.dense_finish is None

    def _choose(self, rule: KeepRule, score: Callable[[], Tensor]) -> KeptSet:
        shares = self._shares(rule)
        if shares is not None:
            blocks, slots, exact = self._best(shares, score)
            tokens = self.tokens_of(blocks)
        else:
            assert rule.threshold is not None  # one of the two is set
            blocks = self.real
            if rule.threshold > 0:
                blocks = blocks_above(
                    score(), self.real, self.required, rule.threshold, self.block_documents
                )
            tokens = self.tokens_of(blocks)
            # The scores fix how many slots there are, so the host waits for them at each choice.
            slots, exact = tokens.sum(1).tolist(), True
        self.times_kept += tokens
        self.row_slots = slots
        num_slots = max(1, *slots)
        exact &= all(n == num_slots for n in slots)
        return kept_set(tokens, blocks, num_slots, exact, shared=self.config.agree_across_layers)

    def _best(
        self, shares: list[float], score: Callable[[], Tensor]
    ) -> tuple[Tensor, list[int], bool]:
        """The best share of blocks ``[B, N]``, each row's slots, and whether it fills them all."""
        pairs = list(zip(self.rows, shares, strict=True))
        budgets = [row.num_blocks(share) for row, share in pairs]
        self._note_excess(shares)
        everything = all(k == row.blocks for k, row in zip(budgets, self.rows, strict=True))
        # What is set, not what a batch holds, is the same on all processes.
        settled = min(shares) == 1 and (self.retention is None or not self._spares_rows)
        if settled or (everything and not self.score_always):
            blocks = self.real
        else:
            blocks = keep_blocks(
                score(), self.real, self.required, self._column(budgets), self.block_documents
            )
        exact = all(row.tokens == row.most_tokens(row.blocks, self.block_size) for row in self.rows)
        return blocks, self._slots(shares), exact

    def _slots(self, shares: list[float]) -> list[int]:
        """That each row needs."""
        size = self.block_size
        return [
            min(row.tokens, row.most_tokens(row.num_blocks(share), size))
            for row, share in zip(self.rows, shares, strict=True)
        ]

    def _column(self, numbers: list[int]) -> Tensor | int:
        """``[B, 1]`` on the device, or the number that all of them are."""
        if len(set(numbers)) == 1:
            return numbers[0]
        # Filled where they are needed: nothing is copied, which the host or a graph would wait for.
        return torch.stack([torch.full((1,), n, device=self.device) for n in numbers])

    def _note_excess(self, shares: list[float]) -> None:
        for index, (row, share) in enumerate(zip(self.rows, shares, strict=True)):
            budget = num_kept_blocks(share, row.blocks)
            if row.label_blocks > budget:
                self.exceeded = (
                    f"row {index} has labels in {row.label_blocks} of its {row.blocks} blocks, "
                    f"more than retention {share:g} allows ({budget}): "
                    "all blocks with labels are kept"
                )

    def supervised(self) -> Tensor:
        """Tokens kept at least as often as the average token of their row: ``[B, T]`` bool."""
        mean = self.times_kept.sum(1, keepdim=True) / self._tokens.clamp_min(1)
        supervised = self.times_kept >= mean
        return supervised if self.valid is None else supervised & self.valid

    @property
    def most_labels(self) -> int | None:
        """No more tokens than this have a label that is asked for; None if only the device knows.

        Where processes share the sequence, of the tokens that this one holds.

        That is so where layers choose sets of their own, and tokens kept most often are asked.
        """
        labels = sum(row.labels for row in self.rows)
        if self.config.supervise == "all":
            return labels
        if set(self.agreed) != {"attention"}:
            return None
        kept = self.agreed["attention"]
        slots = (self.share(kept) or kept).index.shape[1]
        return sum(min(row.labels, slots) for row in self.rows)
