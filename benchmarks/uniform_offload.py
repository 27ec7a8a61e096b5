"""LeMo's offload with an equal share of the budget for each layer: what its own is compared with.

What a layer stores beyond its share stays on the device, however much or little other layers keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor

from lemo_hf.memory.offload import SLAB, HostMemory


@contextmanager
def equal_shares() -> Iterator[None]:
    """Give each layer the same part of the budget."""
    put, release = HostMemory.put, HostMemory.release

    def put_within_share(self: HostMemory, tensor: Tensor, unit: int):
        taken = self.__dict__.setdefault("_taken_by_unit", {})
        size = -(-tensor.numel() * tensor.element_size() // SLAB)
        if taken.get(unit, 0) + size > self.most // (self.last + 1):
            return tensor
        stored = put(self, tensor, unit)
        if stored is not tensor:
            taken[unit] = taken.get(unit, 0) + size
            for slab in stored.slabs:
                slab.unit = unit
        return stored

    def release_share(self: HostMemory, slabs: list):
        taken = self.__dict__.get("_taken_by_unit", {})
        for slab in slabs:
            taken[slab.unit] -= 1
        release(self, slabs)

    with (
        patch.object(HostMemory, "put", put_within_share),
        patch.object(HostMemory, "release", release_share),
    ):
        yield
