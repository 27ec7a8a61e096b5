"""One sequence over several processes: which process holds which rows, and how rows are exchanged.

Each process of a group holds a shard of the stream: whole blocks, in order. Blocks are chosen over
the whole sequence, so shards keep different numbers of rows. For a sublayer the kept rows are sent
to equal shares, in order (`Share.spread`), and the results are sent back (`Share.collect`).
Attention is divided by heads (`lemo_hf.parallel.sequence_attention`). All of this uses one
collective, all-to-all, whose backward is itself with senders and receivers exchanged.

All processes of a group get the same batch, so they agree on every size without communication. Only
the places of the kept rows are read from the device, once for each kept set.

Source: DeepSpeed Ulysses, arXiv:2309.14509. transformers' own way to it (``sp_size``) is an adapter
around DeepSpeed that shards batches before the model is called and expects equal shards of whole
sequences; its other one (``cp_size``) patches SDPA for a fixed split and needs FSDP2.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lemo_hf.batch.selection import KeptSet

# Names by which accelerate tells processes with other rows from those with the same.
_OTHERS, _SAME = "dp_replicate", "tp"


class SequenceGroup:
    """A group of processes that share each sequence: ``size`` neighbours, by rank.

    Attributes:
        size: Number of processes.
        rank: Rank of this process in the group.
        mesh: Device mesh of all processes, ``(groups, size)``.
        group: Process group for collectives.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.group = mesh, mesh[_SAME].get_group()
        self.size, self.rank = mesh[_SAME].size(), mesh[_SAME].get_local_rank()


def sequence_group(size: int) -> SequenceGroup | None:
    """The group of ``size`` processes that this process belongs to; None for 1.

    All processes must call this together; after the first call nothing is sent.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, or the processes cannot be divided
            into such groups.
    """
    if size == 1:
        return None
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % size:
        raise ValueError(
            f"sequence_parallel_size={size} needs a multiple of {size} processes, and there are "
            f"{world}: start them with accelerate launch --num_processes {size} ..."
        )
    return _group(dist.group.WORLD, size)


@cache
def _group(world: dist.ProcessGroup, size: int) -> SequenceGroup:
    kind = "cuda" if "nccl" in dist.get_backend(world) else "cpu"
    shape = dist.get_world_size(world) // size, size
    return SequenceGroup(init_device_mesh(kind, shape, mesh_dim_names=(_OTHERS, _SAME)))


class Shards:
    """One sequence, as the processes of a group hold it.

    Args:
        group: Processes that share the sequence.
        tokens: Number of tokens of the whole sequence.
        block_size: Tokens a block; shards begin at blocks.
    """

    def __init__(self, group: SequenceGroup, tokens: int, block_size: int):
        self.group = group
        blocks = -(-tokens // block_size)
        self._blocks = even_bounds(blocks, group.size)
        self.bounds = [min(tokens, block * block_size) for block in self._blocks]
        self._shares: dict[int, tuple[KeptSet, Share]] = {}

    def part(self, x: Tensor) -> Tensor:
        """This process's shard of ``x [B, T, ...]``."""
        start, end = self.bounds[self.group.rank : self.group.rank + 2]
        return x[:, start:end]

    def take(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model for this process's shard; positions stay those of the sequence."""
        names = ("input_ids", "inputs_embeds")
        parts = {name: self.part(kwargs[name]) for name in names if kwargs.get(name) is not None}
        if kwargs.get("position_ids") is None:
            (x, *_) = parts.values()
            parts["position_ids"] = torch.arange(self.bounds[-1], device=x.device)[None]
        return {**kwargs, **parts}

    def gather_blocks(self, x: Tensor) -> Tensor:
        """Values of each process's blocks, ``[1, N_r, ...]``, gathered to ``[1, N, ...]``."""
        counts = [end - start for start, end in pairwise(self._blocks)]
        copies = torch.cat([x[0]] * self.group.size)
        return exchange(copies, [x.shape[1]] * self.group.size, counts, self.group)[None]

    def agreed(self, scores: Tensor) -> Tensor:
        """The first process's ``scores`` for all, so that rounding cannot make processes differ."""
        scores = scores.contiguous()
        dist.broadcast(scores, group=self.group.group, group_src=0)
        return scores

    def share(self, kept: KeptSet) -> "Share":
        """The division of the rows of ``kept`` among processes; found once for each set."""
        if id(kept) not in self._shares:
            self._shares[id(kept)] = kept, Share.of(kept, self)
        return self._shares[id(kept)][1]


@dataclass(frozen=True)
class Share:
    """The kept rows that this process holds, and those that it works on.

    Attributes:
        index: Places of the held rows within this process's shard, ``[1, held]`` int64.
        work: Rows that it works on; their ``index [1, n]`` counts from the sequence's beginning.
        counts: Number of rows that each process of the group works on.
        group: Processes that share the sequence.
        send: Number of this process's held rows that each process works on.
        receive: Number of rows of this process's work that each process holds.
        moves: Whether some process works on rows that it does not hold.
    """

    index: Tensor
    work: KeptSet
    counts: list[int]
    group: SequenceGroup
    send: list[int]
    receive: list[int]
    moves: bool

    @classmethod
    def of(cls, kept: KeptSet, shards: Shards) -> "Share":
        """The share of this process in ``kept``, whose slots must all be in use and in order."""
        index, group = kept.index[0], shards.group
        if kept.whole:
            held = working = shards.bounds
        else:
            borders = torch.tensor(shards.bounds, device=index.device)
            held = torch.searchsorted(index, borders).tolist()
            working = even_bounds(len(index), group.size)
        mine = range(held[group.rank], held[group.rank + 1])
        works = range(working[group.rank], working[group.rank + 1])
        return cls(
            index=(index[mine.start : mine.stop] - shards.bounds[group.rank])[None],
            work=replace(kept, index=index[None, works.start : works.stop].contiguous(), cache={}),
            counts=[end - start for start, end in pairwise(working)],
            group=group,
            send=[_overlap(mine, *bounds) for bounds in pairwise(working)],
            receive=[_overlap(works, *bounds) for bounds in pairwise(held)],
            moves=held != working,
        )

    def spread(self, rows: Tensor) -> Tensor:
        """Send rows from the processes that hold them to those that work on them: ``[1, held, H]``
        to ``[1, n, H]``."""
        if not self.moves:
            return rows
        return exchange(rows[0], self.send, self.receive, self.group)[None]

    def collect(self, rows: Tensor) -> Tensor:
        """Send rows back to the processes that hold them: ``[1, n, H]`` to ``[1, held, H]``."""
        if not self.moves:
            return rows
        return exchange(rows[0], self.receive, self.send, self.group)[None]


def even_bounds(count: int, parts: int) -> list[int]:
    """``parts + 1`` bounds of parts whose sizes differ by at most one."""
    return [count * part // parts for part in range(parts + 1)]


def _overlap(own: range, start: int, end: int) -> int:
    return max(0, min(own.stop, end) - max(own.start, start))


class _Exchange(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: "SequenceGroup"
    ) -> Tensor:
        ctx.sizes, ctx.group = (send, receive), group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.sizes
        return _all_to_all(grad, receive, send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: SequenceGroup) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group.group)
    return out


def exchange(x: Tensor, send: list[int], receive: list[int], group: SequenceGroup) -> Tensor:
    """Send rows to the processes of ``group``, in their order, and receive rows from them.

    Args:
        x: Rows to send, ``[sum(send), ...]``.
        send: Number of rows for each process.
        receive: Number of rows from each process.
        group: Processes, all of which must call this.

    Returns:
        Received rows, ``[sum(receive), ...]``.
    """
    return _Exchange.apply(x, send, receive, group)
