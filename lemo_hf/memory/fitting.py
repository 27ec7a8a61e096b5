"""How much layers may store: the level of recomputation that fits the device."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lemo_hf.batch.selection import LayerRows
from lemo_hf.config import UNITS
from lemo_hf.memory.offload import GIB, leaving
from lemo_hf.memory.recompute import TILE_BYTES

# Rows of the stream that the backward of an attention holds for each row it works on: rows, their
# norm, queries, keys, values, output, the gradients of those (keys and values by query head), and
# the queries' in fp32. Llama-3 8B: 11 (`lemo plan`).
WORKING_ROWS = 16
RESERVE = GIB  # for the segments of the loss, ids and fragmentation


def fitting_level(
    rows: Sequence[LayerRows],
    stream: Sequence[int],
    width: int,
    size: int,
    trained: int,
    slabs: int,
    room: int,
) -> str:
    """The first of `UNITS` whose step fits, by an upper bound; the last one if none fits.

    Args:
        rows: Number of rows that each layer keeps in the whole batch.
        stream: Shape of the stream, ``(B, T, H)``.
        width: Width of all query heads together, elements.
        size: Size of an element, bytes.
        trained: Bytes of the trained parameters. In a first step their gradients and Adam's two
            states may still have to be made.
        slabs: Number of slabs of host memory that may be taken.
        room: Free bytes of the device, beside weights, the stream and all else.
    """
    working = WORKING_ROWS * prod(stream) * size + 2 * TILE_BYTES
    left = room - working - RESERVE - 3 * trained
    for level in UNITS[:-1]:
        if stored_bytes(rows, level, stream[2] * size, width * size, slabs) <= left:
            return level
    return UNITS[-1]


def stored_bytes(rows: Sequence[LayerRows], level: str, row: int, output: int, slabs: int) -> int:
    """Bytes that layers store on the device at ``"selective"`` or ``"lean"``.

    ``row`` and ``output`` are bytes of a row of the stream and of attention's output.
    """
    layers: list[list[tuple[str, int]]] = []
    for attention, mlp in rows:
        layers.append([("rows", attention * row), ("output", attention * output)])
        if level == "selective" and mlp is None:
            layers[-1].append(("sum", attention * row))
    gone = leaving(layers, slabs)
    own = sum(mlp * row for _, mlp in rows if mlp is not None)  # they stay
    return (
        own
        + sum(size for parts in layers for _, size in parts)
        - sum(size for parts in gone for _, size in parts)
    )


def local_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter, or of this process's part of it."""
    return parameter.to_local().nbytes if isinstance(parameter, DTensor) else parameter.nbytes


def free_bytes(device: torch.device) -> int:
    """Bytes that PyTorch could still allocate, within the device and the process's own limit."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    cached = reserved - torch.cuda.memory_allocated(device)
    return cached + max(0, min(free, limit - reserved))
