"""Counts of a batch's rows, which decide the shapes of a pass, and their copy to the host."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lemo_hf.batch.selection import num_kept_blocks

# Counts that bound what a pass works on are rounded up to multiples of these, so that rows whose
# answers differ a little in length have the same shapes.
LABELS, LABEL_BLOCKS = 256, 8


@dataclass(frozen=True)
class RowCounts:
    """Counts of one row on the host, which decide how many slots it needs."""

    tokens: int  # that are no padding
    blocks: int  # with at least one such token
    required_blocks: int
    required_tokens: int  # in required blocks
    label_blocks: int
    labels: int  # that a token predicts, not padding
    wrong_labels: int = 0  # that are no token and not ignored
    apart: int = 0  # tokens of the prompt that differ from the partner's, of pairs

    def num_blocks(self, retention: float) -> int:
        return max(num_kept_blocks(retention, self.blocks), self.required_blocks)

    @property
    def most_labels(self) -> int:
        """Upper bound of ``labels``."""
        return min(self.tokens, -(-self.labels // LABELS) * LABELS)

    @property
    def most_label_blocks(self) -> int:
        """Upper bound of ``label_blocks``; 0 if there are none."""
        return min(self.blocks, -(-self.label_blocks // LABEL_BLOCKS) * LABEL_BLOCKS)

    def shapes(self, least: int) -> tuple:
        """The counts that decide the shapes of a pass that keeps ``least`` blocks or more of a row
        without padding: rows with equal counts have equal shapes."""
        exceeds = self.required_blocks > least
        required = (self.required_blocks, self.required_tokens) if exceeds else None
        return self.tokens, self.blocks, required, self.most_label_blocks, self.most_labels

    def most_tokens(self, blocks: int, size: int) -> int:
        """Upper bound of the tokens in so many blocks: padding may cut required blocks short, all
        others count ``size``."""
        return self.required_tokens + (blocks - self.required_blocks) * size


class Counts:
    """Counts of rows, one `RowCounts` each, while they are copied from the device to the host.

    Shapes depend on them. The copy begins before the first layer is launched and is awaited at the
    first choice, so that the device has work while the host waits.
    """

    def __init__(self, table: Tensor, known: list[RowCounts] | None):
        self.on_device = table
        self._copy, self._arrived = table, None
        if known is not None:
            self.on_host = known
        elif table.is_cuda:
            self._copy = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._copy.copy_(table, non_blocking=True)
            self._arrived = torch.cuda.current_stream(table.device).record_event()

    @cached_property
    def on_host(self) -> list[RowCounts]:
        """The counts, on the host, which waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [RowCounts(*row) for row in self._copy.tolist()]
