"""Host memory in dry steps: counted, not taken.

Pinning tens of GiB takes longer than a dry step, and more than the machine has must not be tried.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import transformers.modeling_utils
from torch import Tensor

from lemo_hf.memory import offload

HOST_LIMIT = 110 * 2**30  # bytes that a trial may pin; the machine has 128 GiB


class HostBytes:
    """Pinned memory a step would hold.

    Args:
        rounding: PyTorch's pinned memory comes in powers of two (`pinned_rounding`).

    Attributes:
        now: Bytes.
        most: The most at a time.
        blocks: The most blocks of each size at a time.
    """

    def __init__(self, rounding: bool):
        self.rounding = rounding
        self.now = self.most = 0
        self.blocks: Counter[int] = Counter()
        self._alive: Counter[int] = Counter()

    def add(self, size: int) -> None:
        """Take a block."""
        size = self._rounded(size)
        self.now += size
        self.most = max(self.most, self.now)
        self._alive[size] += 1
        self.blocks[size] = max(self.blocks[size], self._alive[size])

    def remove(self, size: int) -> None:
        """Give a block back."""
        size = self._rounded(size)
        self.now -= size
        self._alive[size] -= 1

    def _rounded(self, size: int) -> int:
        return 1 << (size - 1).bit_length() if self.rounding and size else size


class _Elsewhere:
    """A tensor that would lie in host memory."""

    def __init__(self, tensor: Tensor, count: HostBytes):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.count, self.size = count, tensor.numel() * tensor.element_size()
        count.add(self.size)

    def __del__(self):
        self.count.remove(self.size)

    def back(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@contextmanager
def counted_host(rounding: bool) -> Iterator[HostBytes]:
    """Count what transformers' offload and LeMo's would pin; ``rounding`` as for `HostBytes`."""
    count = HostBytes(rounding)
    shared = {}

    def stand_in(*args, **kwargs):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Elsewhere(tensor, count), _Elsewhere.back
        )

    def one_slab_for_all(self, pinned: bool):
        if pinned not in shared:
            shared[pinned] = torch.empty(offload.SLAB, dtype=torch.uint8, pin_memory=pinned)
        self.bytes, self.read = shared[pinned], None
        count.add(offload.SLAB)  # slabs are kept for the next step, as real ones are

    with (
        patch.object(transformers.modeling_utils, "save_on_cpu", stand_in),
        patch.object(offload._Slab, "__init__", one_slab_for_all),
    ):
        yield count


def _host_stat(newer: str, older: str) -> int:
    if not torch.cuda.is_available():
        return 0
    stats = torch.cuda.host_memory_stats()
    # Until PyTorch 2.9 what is in use was called allocated, and what is held reserved.
    return stats[older if "reserved_bytes.current" in stats else newer]


def pinned_bytes() -> int:
    """Pinned memory that PyTorch holds, in use or not."""
    return _host_stat("allocated_bytes.current", "reserved_bytes.current")


def pin_ahead(blocks: dict[int, int]) -> None:
    """Let PyTorch hold these pinned blocks, so that no timed step has to take them.

    Args:
        blocks: How many of each size.
    """
    if not torch.cuda.is_available():
        return
    if pinned_bytes() + sum(size * count for size, count in blocks.items()) > HOST_LIMIT:
        empty_host_cache()
    held = [
        torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for size, count in blocks.items()
        for _ in range(count)
    ]
    del held


def pinned_rounding() -> bool:
    """Whether PyTorch takes pinned memory in powers of two."""
    if not torch.cuda.is_available():
        return False
    before = pinned_bytes()
    odd = torch.empty(96 * 2**20, dtype=torch.uint8, pin_memory=True)
    return pinned_bytes() - before > odd.numel()


def empty_host_cache() -> None:
    """Give pinned memory that nobody uses back to the system."""
    if torch.cuda.is_available() and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
