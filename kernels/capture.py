"""Recording of launches as a CUDA graph."""

import gc
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def capture(
    run: Callable[[], Result], pool: Any, device: torch.device
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Call ``run`` without computing anything, and record what it launches.

    Args:
        run: Function without arguments; it may not wait for the device.
        pool: Memory pool that graphs share, or None.
        device: CUDA device.

    Returns:
        The graph, and what ``run`` returned: tensors that a replay writes.
    """
    graph = torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()  # what is cast must be cast inside
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # what it frees might call CUDA in between
    # Other threads (pinning batches, NCCL) go on meanwhile.
    recording = torch.cuda.graph(graph, pool, _stream(device), capture_error_mode="thread_local")
    try:
        # The outer one goes back to this stream after a failure too, which the inner one does not.
        with torch.cuda.stream(torch.cuda.current_stream(device)), recording:
            return graph, run()
    finally:
        if collecting:
            gc.enable()
        torch.clear_autocast_cache()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream to record on."""
    return torch.cuda.Stream(device)
