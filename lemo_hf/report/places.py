"""Where in a row blocks are kept: counted on the device, for a bounded number of moments."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PLACES = 40  # parts of a row, each as long as the others, whatever the row's length
MOST_MOMENTS = 40
MOST_CURVES = 512  # of all moments; layers with sets of their own have a curve each
FEWEST_MOMENTS = 8


def kept_places(sets: Tensor, real: Tensor) -> Tensor:
    """What was kept of each place of the rows, summed over the rows.

    A block counts for the places it covers, by how much of them it covers. No step waits for it.

    Args:
        sets: Kept blocks, ``[S, B, N]`` bool, all of them real.
        real: Blocks with tokens that are no padding, ``[B, N]`` bool.

    Returns:
        ``[S, PLACES]`` float32; a row adds a share in [0, 1].
    """
    blocks = real.sum(1, keepdim=True)
    edges = torch.arange(PLACES + 1, device=real.device) * blocks  # in parts of a block
    whole, part = edges // PLACES, edges % PLACES
    ranks = F.pad(real.cumsum(1), (1, 0))
    counts = F.pad(sets.cumsum(2, dtype=torch.int32), (1, 0))

    def among_first(number: Tensor) -> Tensor:
        """Kept blocks among the first real ones of each row, ``[S, B, PLACES + 1]``."""
        where = torch.searchsorted(ranks, number)
        return counts.gather(2, where.expand(len(sets), -1, -1))

    kept = among_first(whole)
    kept = PLACES * kept + part * (among_first((whole + 1).minimum(blocks)) - kept)
    return (kept.diff(dim=2) / blocks.clamp(min=1)).sum(1)


def add_moment(moments: list[dict[str, Any]], moment: dict[str, Any]) -> None:
    """Append ``moment``; of too many, the two neighbours with the fewest steps become one.

    Args:
        moments: Of the run so far, see `Kept.take`.
        moment: What follows them.
    """
    moments.append(moment)
    most = max(FEWEST_MOMENTS, min(MOST_MOMENTS, MOST_CURVES // len(moment["attention"])))
    while len(moments) > most:
        spans = [b["last"] - a["first"] for a, b in pairwise(moments)]
        i = spans.index(min(spans))
        moments[i : i + 2] = [_one(*moments[i : i + 2])]


def moments_until(moments: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Those of a run that goes on from ``step``; of one that goes beyond it, what lies before."""
    found = []
    for moment in moments:
        first, last = moment["first"], moment["last"]
        if last > step >= first:
            rows = round(moment["rows"] * (step - first + 1) / (last - first + 1))
            found.append({**moment, "last": step, "rows": max(1, rows)})
        elif last <= step:
            found.append(moment)
    return found


def mean_curves(moments: list[dict[str, Any]], name: str) -> list[list[float]]:
    """Over all rows of ``moments``: one curve for each that they have."""
    rows = sum(moment["rows"] for moment in moments)
    weights = [moment["rows"] / rows for moment in moments]
    return [
        [sum(w * x for w, x in zip(weights, at, strict=True)) for at in zip(*same, strict=True)]
        for same in zip(*(moment[name] for moment in moments), strict=True)
    ]


def _one(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    one = {"first": a["first"], "last": b["last"], "rows": a["rows"] + b["rows"]}
    for name in ("attention", "mlp"):
        curves = mean_curves([a, b], name)
        one[name] = [[round(share, 4) for share in curve] for curve in curves]
    return one
