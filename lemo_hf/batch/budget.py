"""How many blocks, and tokens in them, the rows of one pass keep."""

from collections.abc import Iterator
from dataclasses import dataclass

from lemo_hf.batch.facts import BatchFacts
from lemo_hf.batch.pairs import pair_budgets
from lemo_hf.batch.selection import LayerRows, num_kept_blocks
from lemo_hf.config import KeepRule, LeMoConfig


@dataclass(frozen=True)
class Budget:
    """What rows keep in one pass.

    Attributes:
        config: The user's choice.
        retention: What rows keep whatever the config says: the finish of a run; None: what it says.
            With policy ``"auto"`` and no ``dense_finish`` of the user's, rows that ask are spared.
    """

    config: LeMoConfig
    retention: float | None

    def shares(self, rule: KeepRule, batch: BatchFacts) -> list[float] | None:
        """What each row keeps by ``rule``; None where a threshold decides."""
        if self.retention is None:
            return None if rule.retention is None else [rule.retention] * batch.batch
        if not self._spares_rows:
            return [self.retention] * batch.batch
        assert rule.retention is not None  # the policy of thresholds is never "auto"
        return [rule.retention if row.label_blocks else self.retention for row in batch.rows]

    def is_everything(self, shares: list[float]) -> bool:
        """Rows keep everything by what is set, not by what a batch holds: the same on all
        processes."""
        return min(shares) == 1 and (self.retention is None or not self._spares_rows)

    def blocks(self, shares: list[float], batch: BatchFacts) -> list[int]:
        """That each row keeps."""
        found = [row.num_blocks(share) for row, share in zip(batch.rows, shares, strict=True)]
        return pair_budgets(found, batch.rows) if batch.pairs else found

    def slots(self, shares: list[float], batch: BatchFacts) -> list[int]:
        """That each row needs for its tokens."""
        return [
            min(row.tokens, row.most_tokens(blocks, batch.block_size))
            for row, blocks in zip(batch.rows, self.blocks(shares, batch), strict=True)
        ]

    def excess(self, shares: list[float], batch: BatchFacts) -> str | None:
        """Why the last of the rows that keep more than their share does; None if no row does."""
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
        """Of each layer of the model, in the whole batch; of one of ``processes`` that share it.

        Known before a layer has chosen. Layers that thresholds choose for may keep every row.
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
        """A finish that the user did not ask for holds for rows that are labelled throughout."""
        return self.config.policy == "auto" and self.config.dense_finish is None
