"""Whether attention's outputs fit the device beside everything else a step needs."""

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
    host: HostMemory | None,
) -> bool:
    """Whether all layers may keep attention's output until the backward.

    A bound from above of what the rest needs, compared with what is free when the first layer that
    asks begins.

    Args:
        layer: That layer.
        family: Where its attention is.
        x: Its stream, ``[B, T, H]``.
        rows: That it keeps, in the whole batch.
        num_layers: Of the model.
        host: Takes both rows and outputs as far as its budget goes, or None.
    """
    if x.device.type != "cuda":
        return True
    attention = getattr(layer, family.attention)
    size = x.element_size()
    head = getattr(attention, "head_dim", 0)
    width = attention.config.num_attention_heads * head or x.shape[2]
    stored = num_layers * rows * x.shape[2] * size
    outputs = num_layers * rows * width * size
    if host is not None:
        budget = host.most_bytes
        stored, outputs = max(0, stored - budget), max(0, outputs - max(0, budget - stored))
        if outputs == 0:
            return True
    working = WORKING_ROWS * x.shape[0] * x.shape[1] * x.shape[2] * size + 2 * TILE_BYTES
    return stored + outputs + working + RESERVE < free_bytes(x.device)


def free_bytes(device: torch.device) -> int:
    """What PyTorch could still allocate, by the device and by the process's own limit."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    cached = reserved - torch.cuda.memory_allocated(device)
    return cached + max(0, min(free, limit - reserved))
