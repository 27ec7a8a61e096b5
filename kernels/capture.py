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
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
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
    except BaseException:
        _end(graph, pool, device)
        raise
    finally:
        if collecting:
            gc.enable()
        torch.clear_autocast_cache()


def _end(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """End a recording that failed, if PyTorch left it under way.

    Otherwise no random number could be drawn on the device any more, and no memory be given back.
    """
    try:
        graph.pool()
    except RuntimeError:  # what was launched made the recording void, so that its end failed too
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream to record on."""
    return torch.cuda.Stream(device)
