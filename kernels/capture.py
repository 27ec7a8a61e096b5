"""Noting down what the host launches, as a CUDA graph."""

import gc
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def capture(
    run: Callable[[], Result], pool: Any, device: torch.device
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Call ``run`` without computing anything, and note down what it launches.

    Args:
        run: May not wait for the device.
        pool: Of memory that graphs share, or None.
        device: A CUDA device.

    Returns:
        The launches, and what ``run`` returned: tensors that a replay writes.
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
    """To record on."""
    return torch.cuda.Stream(device)
