"""Host memory of a dry run: takes what it is told to, and holds nothing."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lemo_hf.memory.offload import HostMemory, Stored
from lemo_hf.planning.dry_run import IN_FLIGHT, DryRun

LEAVING = 2  # tensors that are on their way to the host (`HostMemory`)


class DryHost(HostMemory):
    """See the module's docstring.

    Args:
        run: The dry run.
        told: By layer: places of the tensors to take among those that it stores; None: all.
        slab: Bytes that memory is taken in multiples of; 1: as transformers' own offload does.

    Attributes:
        offered: By layer: bytes of each tensor that it stored.
        taken: By layer: bytes of host memory.
    """

    def __init__(self, run: DryRun, told: list[tuple[int, ...] | None], slab: int):
        super().__init__(0, last=-1)
        self.run, self.told, self.slab = run, told, slab
        self.offered: list[list[int]] = [[] for _ in told]
        self.taken = [0] * len(told)

    def put(self, tensor: Tensor, unit: int) -> Tensor | Stored:
        self._unit, told = unit, self.told[unit]
        self.offered[unit].append(tensor.nbytes)
        if told is not None and len(self.offered[unit]) - 1 not in told:
            return tensor
        stored = super().put(tensor, unit)
        if isinstance(stored, Stored):
            self._leaving.append((tensor.detach(), cast(Any, None)))
            self._let_go()
        return stored

    def checkpoint(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' with ``offload=True``: at once, and back when it is asked for."""

        def pack(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            self.taken[self.run.layer] += tensor.nbytes
            return tensor.shape, tensor.dtype

        def unpack(packed: tuple[torch.Size, torch.dtype]) -> Tensor:
            with self.run.named(IN_FLIGHT):
                return torch.empty(packed[0], dtype=packed[1])

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, *args, **{"use_reentrant": False, **kwargs})

    def _take(self, count: int, pinned: bool) -> list:
        self.taken[self._unit] += count * self.slab
        return []

    def _let_go(self, all_of_them: bool = False) -> None:
        while len(self._leaving) > (0 if all_of_them else LEAVING):
            self._leaving.popleft()

    def _fetch(self, stored: Stored) -> None:
        with self.run.named(IN_FLIGHT):
            super()._fetch(stored)
