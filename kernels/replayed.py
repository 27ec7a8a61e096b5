"""A function of tensors whose many small launches become one, by a CUDA graph.

Sorting a row's words launches 300 kernels of 3 us each. The host takes four times as long for this
as the GPU, and a step that keeps few tokens waits for it.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lemo_hf.kernels.capture import capture

logger = logging.getLogger(__name__)

MOST_GRAPHS = 4  # each holds what its function computes on the way
REMEMBERED = 64  # shapes that are remembered until they come again
MOST_ELEMENTS = 2**17  # of an argument: with more the GPU takes longer than the host


class Replayed:
    """Function with the values of ``function``, which uses a graph from the third call with the
    same shapes on.

    The first such call runs without a graph, and the second is recorded, for at most `MOST_GRAPHS`
    kinds of arguments. On a CPU, with long arguments, and while another graph is recorded,
    ``function`` itself runs. Graphs live as long as this object.

    Args:
        function: Function of positional tensors and other hashable arguments, which returns one
            tensor. It may depend on nothing else, wait for nothing, and draw nothing by chance.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._once: deque[tuple] = deque(maxlen=REMEMBERED)
        self._never = False

    def __call__(self, *arguments: Any) -> Tensor:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if self._never or not _worth_it(tensors):
            return self.function(*arguments)
        key = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in arguments)
        if key not in self._graphs:
            if key not in self._once or len(self._graphs) == MOST_GRAPHS:
                self._once.append(key)
                return self.function(*arguments)
            try:
                self._graphs[key] = self._record(arguments, tensors[0].device)
            except torch.OutOfMemoryError:
                return self.function(*arguments)
            except RuntimeError as error:  # of CUDA, where an operation cannot be recorded
                logger.warning("no CUDA graph of %s: %s", self.function.__name__, error)
                self._never = True
                return self.function(*arguments)
        graph, places, result = self._graphs[key]
        for place, value in zip(places, tensors, strict=True):
            place.copy_(value)
        graph.replay()
        return result.clone()

    def _record(
        self, arguments: tuple, device: torch.device
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        own = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        graph, result = capture(lambda: self.function(*own), None, device)
        return graph, [x for x in own if isinstance(x, Tensor)], result


def _worth_it(tensors: list[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False  # a graph's tensors would be inference tensors, which nobody else may fill
    if any(x.requires_grad for x in tensors):
        return False
    return (
        all(x.is_cuda and x.numel() <= MOST_ELEMENTS for x in tensors)
        and bool(tensors)
        and not torch.cuda.is_current_stream_capturing()
    )
