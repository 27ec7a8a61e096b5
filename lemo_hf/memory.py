"""Whether what ``"selective"`` stores fits the device beside everything else a step needs."""

from math import prod

import torch
from torch import Tensor, nn

from lemo_hf.families import Family
from lemo_hf.offload import GIB, HostMemory
from lemo_hf.recompute import TILE_BYTES

# Rows of the stream that the backward of an attention holds for each row it works on: rows, their
# norm, queries, keys, values, output, the gradients of those (keys and values by query head), and
# the queries' in fp32. Llama-3 8B: 11 (`lemo_hf.plan_layer`).
WORKING_ROWS = 16
RESERVE = GIB  # for the segments of the loss, ids and fragmentation


def attention_fits(
    layer: nn.Module,
    family: Family,
    x: Tensor,
    rows: int,
    num_layers: int,
    trained: int,
    host: HostMemory | None,
) -> bool:
    """Whether all layers may keep attention's output and the sum behind it until the backward.

    What a step then needs at most (`bytes_needed`) is compared with what is free when the first
    layer that asks begins.

    Args:
        layer: That layer.
        family: Where its attention is.
        x: Its stream, ``[B, T, H]``.
        rows: That it keeps, in the whole batch.
        num_layers: Of the model.
        trained: Bytes of the parameters that are trained.
        host: Takes all of it as far as its budget goes, or None.
    """
    if x.device.type != "cuda":
        return True
    attention = getattr(layer, family.attention)
    head = getattr(attention, "head_dim", 0)
    width = attention.config.num_attention_heads * head or x.shape[2]
    budget = 0 if host is None else host.most_bytes
    batch, tokens, hidden = x.shape
    needed = bytes_needed(
        (batch, tokens, hidden), x.element_size(), rows, width, num_layers, trained, budget
    )
    return needed <= free_bytes(x.device)


def bytes_needed(
    stream: tuple[int, int, int],
    size: int,
    rows: int,
    width: int,
    num_layers: int,
    trained: int,
    host: int,
) -> int:
    """A bound from above of what a selective step takes beside its weights and its stream.

    Args:
        stream: Its shape, ``(B, T, H)``.
        size: Bytes of an element.
        rows: That a layer keeps, in the whole batch.
        width: Of all query heads.
        num_layers: Of the model.
        trained: Bytes of the parameters that are trained. Their gradients and Adam's two states
            may be still to come in a first step.
        host: Bytes of host memory that may be taken.

    Returns:
        Bytes; 0 if host memory takes all that layers store.
    """
    # A layer's rows, attention's output, and their sum.
    stored = num_layers * rows * (2 * stream[2] + width) * size
    if stored <= host:
        return 0
    working = WORKING_ROWS * prod(stream) * size + 2 * TILE_BYTES
    return stored - host + working + RESERVE + 3 * trained


def free_bytes(device: torch.device) -> int:
    """What PyTorch could still allocate, by the device and by the process's own limit."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    cached = reserved - torch.cuda.memory_allocated(device)
    return cached + max(0, min(free, limit - reserved))
