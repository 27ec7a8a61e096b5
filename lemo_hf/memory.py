"""In which layers what ``"selective"`` stores fits the device beside all else a step needs."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from lemo_hf.families import Family
from lemo_hf.offload import GIB, HostMemory
from lemo_hf.recompute import TILE_BYTES

RESERVE = GIB  # for the segments of the loss and ids
SPARE = 32  # one part of so many stays free, for fragmentation and the buffers of DDP and FSDP


def layers_with_room(
    layer: nn.Module,
    family: Family,
    x: Tensor,
    rows: Sequence[int],
    trained: int,
    host: HostMemory | None,
) -> tuple[bool, ...]:
    """Which layers may keep attention's output and the sum behind it until the backward.

    Asked when the first of them begins, of what is free then.

    Args:
        layer: That layer.
        family: Where its attention is.
        x: Its stream, ``[B, T, H]``.
        rows: That each layer keeps, in the whole batch.
        trained: Bytes of the parameters that are trained.
        host: Takes what layers store as far as its budget goes, or None.
    """
    if x.device.type != "cuda":
        return (True,) * len(rows)
    attention = getattr(layer, family.attention)
    head = getattr(attention, "head_dim", 0)
    width = attention.config.num_attention_heads * head or x.shape[2]
    budget = 0 if host is None else host.most_bytes
    batch, tokens, hidden = x.shape
    return choose_layers(
        (batch, tokens, hidden),
        x.element_size(),
        rows,
        width,
        trained,
        budget,
        free_bytes(x.device),
    )


def choose_layers(
    stream: tuple[int, int, int],
    size: int,
    rows: Sequence[int],
    width: int,
    trained: int,
    host: int,
    room: int,
) -> tuple[bool, ...]:
    """See `layers_with_room`; by a bound from above of what a step takes beside its weights.

    Layers with most rows come first: what they store grows with their rows, the time that it saves
    with the square of them.

    Args:
        stream: Its shape, ``(B, T, H)``.
        size: Bytes of an element.
        rows: That each layer keeps, in the whole batch.
        width: Of all query heads.
        trained: Bytes of the parameters that are trained. Their gradients and Adam's two states
            may be still to come in a first step.
        host: Bytes of host memory that may be taken.
        room: Bytes of the device that are free.
    """
    hidden, most = stream[2], max(rows)
    # Besides the gradient of the stream: what the backward of an attention or an MLP holds for each
    # row that it works on. Attention: rows, their norm and their gradient, queries, keys, values,
    # output, gradients of those by query head, and the queries' in fp32 (Llama-3 8B: 11 times
    # the hidden size, `lemo_hf.plan_layer`). MLP: rows, update, two gradients, their sum, tiles.
    attention = most * (3 * hidden + 10 * width) * size
    mlp = most * 5 * hidden * size + 2 * TILE_BYTES
    working = prod(stream) * size + max(attention, mlp) + RESERVE + 3 * trained
    more = hidden + width  # attention's output, and its sum with the layer's rows
    if host:  # of the layer at work and the next one, on their way
        working += 2 * most * (hidden + more) * size
    stored = sum(rows) * hidden * size
    chosen = [False] * len(rows)
    for index in sorted(range(len(rows)), key=lambda i: -rows[i]):
        stored += rows[index] * more * size
        if working + max(0, stored - host) > room - room // SPARE:
            break
        chosen[index] = True
    return tuple(chosen)


def free_bytes(device: torch.device) -> int:
    """What PyTorch could still allocate, by the device and by the process's own limit."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    cached = reserved - torch.cuda.memory_allocated(device)
    return cached + max(0, min(free, limit - reserved))
