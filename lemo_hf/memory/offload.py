"""Pinned host memory for what layers store, with copies beside the computation.

`HostMemory.put` stores in the forward and `HostMemory.get` reads in the backward; copies run on two
CUDA streams of their own. In the backward, the unit before the one that is read is fetched at the
same time, so that it is there when it is needed. Layers that keep more rows copy more, and have
more computation to hide the copy. What does not fit `HostMemory` stays on the device, and so does
what the last layer stores, which is needed first.

At most two units are in flight in each direction. Pinned memory is taken in slabs, which are used
again in every step.

Source: LeMo, arXiv:2501.09767, "sparsity-sensitive offload".
"""

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

GIB = 2**30
SLAB = 64 * 2**20  # bytes: large enough for full speed, small enough to waste little
SMALL = 2**20  # bytes: less than this is not worth a copy


def leaving(layers: Sequence[Sequence[tuple[str, int]]], slabs: int) -> list[list[tuple[str, int]]]:
    """Names and bytes, by layer, of what layers store in `HostMemory` of so many slabs."""
    taken: list[list[tuple[str, int]]] = []
    for parts in layers[:-1]:
        taken.append([])
        for part, size in parts:
            count = -(-size // SLAB)
            if size >= SMALL and count <= slabs:
                taken[-1].append((part, size))
                slabs -= count
    return [*taken, []]


class _Slab:
    """A piece of pinned memory, and the event after which it may be written to again."""

    def __init__(self, pinned: bool):
        self.bytes = torch.empty(SLAB, dtype=torch.uint8, pin_memory=pinned)
        self.read: torch.cuda.Event | None = None


class Stored:
    """A tensor in host memory, and on its device once it is fetched."""

    def __init__(self, host: "HostMemory", tensor: Tensor, slabs: list[_Slab], unit: int):
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.host, self.slabs, self.unit = host, slabs, unit
        self.fetched: Tensor | None = None
        self.handed_out = False
        self.copied: torch.cuda.Event | None = None  # out, then back

    def __del__(self) -> None:
        if self.fetched is not None and self.copied is not None:
            # Nobody asked for it: its memory must not be another's before it has arrived.
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        self.host.release(self.slabs)


class HostMemory:
    """Pinned host memory of one model's layers; see the module's docstring.

    Args:
        gib: Greatest amount of pinned memory, GiB.
        last: Number of the unit that stays on the device.

    Attributes:
        most: Greatest number of slabs.
    """

    def __init__(self, gib: float, last: int):
        self.most = int(gib * GIB) // SLAB
        self.last = last
        self._made = 0
        self._free: list[_Slab] = []
        self._order: list[weakref.ref[Stored]] = []
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._out: torch.cuda.Stream | None = None
        self._back: torch.cuda.Stream | None = None

    @property
    def pinned_bytes(self) -> int:
        """Pinned memory taken so far."""
        return self._made * SLAB

    def put(self, tensor: Tensor, unit: int) -> Tensor | Stored:
        """Store ``tensor`` of ``unit``. Returns the tensor itself if it stays on the device."""
        size = tensor.numel() * tensor.element_size()
        if size < SMALL or unit == self.last or not _is_dense(tensor):
            return tensor
        slabs = self._take(-(-size // SLAB), tensor.is_cuda)
        if slabs is None:
            return tensor
        stored = Stored(self, tensor, slabs, unit)
        if tensor.is_cuda:
            self._copy_out(tensor.detach(), stored)
        else:
            _copy(tensor, slabs, back=False)
        self._order = [ref for ref in self._order if ref() is not None]
        self._order.append(weakref.ref(stored))
        return stored

    def get(self, stored: Tensor | Stored) -> Tensor:
        """Read what was stored, and start fetching the unit before it."""
        if not isinstance(stored, Stored):
            return stored
        self._let_go(all_of_them=True)
        waiting = [entry for ref in reversed(self._order) if (entry := ref()) is not None]
        if stored.fetched is None:
            self._fetch(stored)
        for entry in waiting:
            ahead = entry.fetched is None and not entry.handed_out
            if ahead and stored.unit - 1 <= entry.unit <= stored.unit:
                self._fetch(entry)
        if stored.copied is not None:
            torch.cuda.current_stream(stored.device).wait_event(stored.copied)
        tensor = stored.fetched
        assert tensor is not None  # by `_fetch`
        stored.fetched, stored.handed_out = None, True
        return tensor

    def release(self, slabs: list[_Slab]) -> None:
        """Make slabs free again."""
        self._free.extend(slabs)

    def _take(self, count: int, pinned: bool) -> list[_Slab] | None:
        if count > len(self._free) + self.most - self._made:
            return None
        while len(self._free) < count:
            self._free.append(_Slab(pinned))
            self._made += 1
        return [self._free.pop() for _ in range(count)]

    def _copy_out(self, tensor: Tensor, stored: Stored) -> None:
        out, _ = self._streams(tensor.device)
        self._let_go()
        out.wait_stream(torch.cuda.current_stream(tensor.device))
        for slab in stored.slabs:
            if slab.read is not None:
                out.wait_event(slab.read)
        with torch.cuda.stream(out):
            _copy(tensor, stored.slabs, back=False)
            stored.copied = out.record_event()
        self._leaving.append((tensor, stored.copied))

    def _let_go(self, all_of_them: bool = False) -> None:
        """Drop tensors that have been copied; two may still be in flight.

        The CUDA stream that uses their memory next waits for the copy. Marking them as used by the
        copying stream instead would let the host, which runs ahead, decide when they are free.
        """
        while len(self._leaving) > (0 if all_of_them else 1):
            tensor, copied = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(copied)

    def _fetch(self, stored: Stored) -> None:
        shape, stride = stored.shape, stored.stride
        tensor = torch.empty_strided(shape, stride, dtype=stored.dtype, device=stored.device)
        if tensor.is_cuda:
            # The memory may have been somebody else's until now.
            _, back = self._streams(stored.device)
            back.wait_stream(torch.cuda.current_stream(stored.device))
            assert stored.copied is not None  # by `_copy_out`
            back.wait_event(stored.copied)
            with torch.cuda.stream(back):
                _copy(tensor, stored.slabs, back=True)
                stored.copied = back.record_event()
            for slab in stored.slabs:
                slab.read = stored.copied
        else:
            _copy(tensor, stored.slabs, back=True)
        stored.fetched = tensor

    def _streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """The CUDA streams of copies to the host and back, made at the first use."""
        if self._out is None or self._back is None:
            self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._out, self._back


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are contiguous in memory, in any order of dimensions."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda i: (-strides[i], -tensor.shape[i]))
    return tensor.permute(order).is_contiguous()


def _copy(tensor: Tensor, slabs: list[_Slab], back: bool) -> None:
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    for slab, part in zip(slabs, flat.split(SLAB), strict=True):
        there, here = slab.bytes[: len(part)], part
        (here if back else there).copy_(there if back else here, non_blocking=True)
