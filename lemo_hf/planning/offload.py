"""What of a model's layers leaves the device, and what is on its way, at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lemo_hf.memory.offload import SLAB, leaving
from lemo_hf.planning.layer import LayerBytes


@dataclass(frozen=True)
class Offload:
    """As `lemo_hf.memory.offload.HostMemory` does it, or transformers' checkpointing.

    Attributes:
        layers: Of the model.
        slabs: Of pinned memory that may be taken.
        stock: transformers offloads: a checkpoint's input in one piece, whatever its size, at once.
    """

    layers: Sequence[LayerBytes]
    slabs: int
    stock: bool

    @cached_property
    def leaving(self) -> list[list[tuple[str, int]]]:
        """Part and bytes of what leaves, by layer."""
        if self.stock:
            return [list(layer.may_leave[:1]) for layer in self.layers]
        return leaving([layer.may_leave for layer in self.layers], self.slabs)

    @property
    def pinned(self) -> int:
        """Bytes of pinned memory."""
        sizes = [size for leaving in self.leaving for _, size in leaving]
        return sum(sizes if self.stock else (-(-size // SLAB) * SLAB for size in sizes))

    def bytes_of(self, index: int) -> int:
        """That have left layer ``index``."""
        return sum(size for _, size in self.leaving[index])

    def remaining(self, index: int) -> dict[str, int]:
        """What layer ``index`` has saved and is still on the device."""
        saved = dict(self.layers[index].saved)
        for part, size in self.leaving[index]:
            saved[part] -= size
        return saved

    def going(self, index: int) -> int:
        """Bytes of earlier layers on their way when layer ``index`` has sent all of its own.

        From the number of layers on: when all have.
        """
        sent = [(i, size) for i, some in enumerate(self.leaving[: index + 1]) for _, size in some]
        return 0 if self.stock else sum(size for i, size in sent[-2:] if i < index)

    def coming(self, index: int) -> int:
        """Bytes of other layers on the device while layer ``index`` runs backward."""
        if self.stock:
            return 0
        if not any(self.leaving[index:]):  # nothing was asked for yet, so the last are still there
            return self.going(index)
        return self.bytes_of(index - 1) if index and self.leaving[index] else 0
