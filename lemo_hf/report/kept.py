"""What passes of a run have kept since its last log, by layer and by place in the row."""

from typing import Any

import torch
from torch import Tensor

from lemo_hf.batch.tally import Seen
from lemo_hf.lemo import LeMo
from lemo_hf.report.places import kept_places

SUBLAYERS = ("attention", "mlp")


class Kept:
    """Counts on the device, which the host reads when it takes them.

    Attributes:
        place_layers: Layers that have a curve of places each; None: one curve is all layers'.
    """

    def __init__(self, lemo: LeMo):
        self._lemo = lemo
        self._layers = lemo.sparse_layers
        self.place_layers = None if lemo.config.agree_across_layers else self._layers
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._counted: Tensor | None = None  # [sublayers x sparse layers]
        self._places: Tensor | None = None  # [sublayers x curves, PLACES]
        self._blocks: Tensor | int = 0
        self._rows: Tensor | int = 0

    def add(self, seen: Seen) -> None:
        """Add the kept blocks of a pass."""
        keys = [(i, name) for name in SUBLAYERS for i in self._layers]
        sets = {id(seen.kept_blocks[key]): seen.kept_blocks[key] for key in keys}  # shared: once
        of_key = {key: list(sets).index(id(seen.kept_blocks[key])) for key in keys}
        chosen = torch.stack(list(sets.values()))
        blocks = chosen.flatten(1).sum(1).unbind()
        curves = kept_places(chosen, seen.real_blocks).unbind()
        layers = self._layers[:1] if self.place_layers is None else self._layers
        counted = torch.stack([blocks[of_key[key]] for key in keys])
        places = torch.stack([curves[of_key[i, name]] for name in SUBLAYERS for i in layers])
        self._counted = counted if self._counted is None else self._counted + counted
        self._places = places if self._places is None else self._places + places
        self._blocks = self._blocks + seen.real_blocks.sum()
        self._rows = self._rows + seen.real_blocks.any(1).sum()

    def take(self, first: int, last: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Shares of these steps; None where no sparse pass was. The counts start anew.

        Returns:
            By sublayer what each layer kept, 1 of dense ones; and a moment: its steps ``first`` to
            ``last``, its ``rows``, and by sublayer the curves, each of what was kept by place.
        """
        if self._counted is None or self._places is None or not int(self._rows):
            return None
        shares = (self._counted / self._blocks).tolist()
        rows = int(self._rows)
        curves = [[round(x, 4) for x in curve] for curve in (self._places / rows).tolist()]
        moment: dict[str, Any] = {"first": first, "last": last, "rows": rows}
        row = {}
        for name, kept, by_place in zip(SUBLAYERS, _halves(shares), _halves(curves), strict=True):
            row[name] = [1.0] * len(self._lemo.rules)
            for i, share in zip(self._layers, kept, strict=True):
                row[name][i] = share
            moment[name] = by_place
        self.reset()
        return row, moment


def _halves(values: list[Any]) -> tuple[list[Any], list[Any]]:
    middle = len(values) // len(SUBLAYERS)
    return values[:middle], values[middle:]
