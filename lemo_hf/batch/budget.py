"""How many blocks, and tokens in them, the rows of one pass keep."""

from collections.abc import Iterator
from dataclasses import dataclass

from lemo_hf.batch.facts import BatchFacts
from lemo_hf.batch.pairs import pair_budgets
from lemo_hf.batch.selection import LayerRows, num_kept_blocks
from lemo_hf.config import KeepRule, LeMoConfig


@dataclass(frozen=True)
class Budget:
    """How much rows keep in one pass.

    Attributes:
        config: The user's settings.
        retention: Share of the blocks that rows keep in the finish, instead of the config's; None
            outside the finish. With policy ``"auto"`` and no ``dense_finish`` set by the user, rows
            whose labels cover a part keep the config's share.
    """

    config: LeMoConfig
    retention: float | None

    def shares(self, rule: KeepRule, batch: BatchFacts) -> list[float] | None:
        """The share of its blocks that each row keeps by ``rule``; None if a threshold decides."""
        if self.retention is None:
            return None if rule.retention is None else [rule.retention] * batch.batch
        if not self._spares_rows:
            return [self.retention] * batch.batch
        assert rule.retention is not None  # the policy of thresholds is never "auto"
        return [rule.retention if row.label_blocks else self.retention for row in batch.rows]

    def is_everything(self, shares: list[float]) -> bool:
        """Whether settings alone, whatever the batch holds, let rows keep everything: the same on
        all processes."""
        return min(shares) == 1 and (self.retention is None or not self._spares_rows)

    def blocks(self, shares: list[float], batch: BatchFacts) -> list[int]:
        """Number of blocks that each row keeps."""
        found = [row.num_blocks(share) for row, share in zip(batch.rows, shares, strict=True)]
        return pair_budgets(found, batch.rows) if batch.pairs else found

    def slots(self, shares: list[float], batch: BatchFacts) -> list[int]:
        """Number of slots that each row needs for its tokens."""
        return [
            min(row.tokens, row.most_tokens(blocks, batch.block_size))
            for row, blocks in zip(batch.rows, self.blocks(shares, batch), strict=True)
        ]

    def excess(self, shares: list[float], batch: BatchFacts) -> str | None:
        """Why a row keeps more than its share (the last one that does), in words; None if no row
        does."""
        why = None
        for index, (row, share) in enumerate(zip(batch.rows, shares, strict=True)):
            budget = num_kept_blocks(share, row.blocks)
            if row.label_blocks > budget:
                why = (
                    f"row {index} has labels in {row.label_blocks} of its {row.blocks} blocks, "
                    f"more than retention {share:g} allows ({budget}): "
                    "all blocks with labels are kept"
                )
        return why

    def stored_rows(
        self, num_layers: int, batch: BatchFacts, processes: int = 1
    ) -> Iterator[LayerRows]:
        """Rows that each layer of the model keeps in the whole batch, or in the part of one of
        ``processes`` that share it.

        This is known before a layer has chosen. Layers with a threshold may keep every row.
        """
        for rule in self.config.layer_rules(num_layers):
            attention, mlp = (None, None) if rule is None else rule
            rows = self._rows_of(attention, batch, processes)
            yield rows, None if mlp is None else self._rows_of(mlp, batch, processes)

    def _rows_of(self, rule: KeepRule | None, batch: BatchFacts, processes: int) -> int:
        shares = None if rule is None else self.shares(rule, batch)
        rows = batch.tokens if shares is None else max(1, *self.slots(shares, batch))
        return -(-batch.batch * rows // processes)

    @property
    def _spares_rows(self) -> bool:
        """Whether the finish spares rows whose labels cover a part: if the user did not ask for it,
        it holds only for rows that are labelled throughout."""
        return self.config.policy == "auto" and self.config.dense_finish is None
