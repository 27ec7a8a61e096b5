"""The level of recomputation that fits the memory, for layers that follow gradient
checkpointing."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lemo_hf.batch.selection import LayerRows
from lemo_hf.config import UNITS
from lemo_hf.core.family import Family
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.memory.fitting import fitting_level, free_bytes, local_bytes
from lemo_hf.memory.offload import HostMemory

logger = logging.getLogger(__name__)

MOST_SHAPES = 1024  # whose levels are remembered


class Levels:
    """Levels by the shape of a batch and the number of kept rows, each found once.

    Args:
        parameters: Parameters of the model.
        family: Names of its parts.
        layers: The decoder layers.
        host: Pinned host memory for what layers store, or None.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterator[nn.Parameter]],
        family: Family,
        layers: Sequence[nn.Module],
        host: HostMemory | None,
    ):
        self._parameters, self._family = parameters, family
        self._layers, self._host = layers, host
        self._found: dict[tuple, str] = {}

    def of(self, sparse_pass: SparsePass, x: Tensor) -> str:
        """The level of all layers of the pass, one of `UNITS`; a layer reads ``x``."""
        if sparse_pass.level is None:  # it is the first that asks
            rows = tuple(sparse_pass.stored_rows(len(self._layers)))
            if (x.shape, rows) not in self._found:
                level = self._fitting(x, rows)
                if level not in self._found.values():
                    logger.info(
                        "recompute=%r fits the memory for batches of %d x %d tokens",
                        level,
                        sparse_pass.batch,
                        sparse_pass.tokens,
                    )
                if len(self._found) == MOST_SHAPES:
                    self._found.clear()
                self._found[x.shape, rows] = level
            sparse_pass.level = self._found[x.shape, rows]
        return sparse_pass.level

    def _fitting(self, x: Tensor, rows: Sequence[LayerRows]) -> str:
        if self._family.recurrent is not None:
            return UNITS[-1]  # nobody knows what recurrent layers would store
        if x.device.type != "cuda":
            return UNITS[0]
        return self.fitting(x, rows, free_bytes(x.device))

    def fitting(self, x: Tensor, rows: Sequence[LayerRows], room: int) -> str:
        """The level that fits ``room`` free bytes of the device, if layers keep these rows."""
        width = max(self._width(layer) or x.shape[2] for layer in self._layers)
        trained = sum(local_bytes(p) for p in self._parameters() if p.requires_grad)
        slabs = 0 if self._host is None else self._host.most
        return fitting_level(rows, x.shape, width, x.element_size(), trained, slabs, room)

    def _width(self, layer: nn.Module) -> int:
        """Width of the queries of all heads; 0 if the layer does not say."""
        attention: Any = getattr(layer, self._family.attention)
        config = getattr(attention, "config", None)  # BLOOM's has none
        return getattr(config, "num_attention_heads", 0) * getattr(attention, "head_dim", 0)
