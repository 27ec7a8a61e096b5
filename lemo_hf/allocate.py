"""A budget shared among layers: each gets the retention at which the loss rises least in all."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from lemo_hf.config import LeMoConfig
from lemo_hf.measure import LossRise, Row, training_bytes
from lemo_hf.selection import num_kept_blocks

GRID = (0.125, 0.25, 0.5, 0.75, 1.0)
GIB = 2**30


@dataclass(frozen=True)
class Allocation:
    """A config within a budget, and what it was compared with.

    Attributes:
        config: The best of those compared, to train with.
        dense_loss: Nats per label of the dense model on the calibration rows.
        loss_rises: Nats above it, as `LossRise` says: ``"uniform"``, the given config with the
            budget as every layer's retention; ``"uniform, a set each"``, the same without
            ``agree_across_layers``; ``"allocated"``.
        retentions: What was allocated, one a layer; it is in ``config`` if it was the best.
        curves: By layer: the loss rise by its retention, all other layers at the budget.
    """

    config: LeMoConfig
    dense_loss: float
    loss_rises: dict[str, float]
    retentions: tuple[float, ...]
    curves: dict[int, dict[float, float]]


def allocate_retention(
    model: nn.Module,
    rows: Sequence[Row],
    config: LeMoConfig,
    budget: float,
    *,
    grid: Sequence[float] = GRID,
    predictors: Any = None,
    progress: bool = True,
) -> Allocation:
    """Share ``budget`` among the sparse layers.

    Each layer's loss rise is measured at each retention of ``grid``, all other layers staying at
    the budget: the ranking of layers is another one while the others keep everything, and wrong
    near the budget. Between the points lies their lower convex hull. Blocks are handed out one
    after the other to the layer where the loss falls most, which is the best allocation as far as
    the layers' curves are convex and add up. Whether they do is measured at the end: the uniform
    config stays if it is better.

    Takes ``len(grid)`` passes a layer over ``rows``; the model is given back as it was.

    Args:
        model: A causal LM or a PEFT model around one, without LeMo on it.
        rows: ``{"input_ids": [T], "labels": [T]}`` without padding.
        config: All but retention; its dense layers stay dense and its MLPs' own shares stay.
            ``cuda_graphs`` comes back as False, since sets that differ between layers rule it out.
        budget: Mean retention of the sparse layers' attention, in (0, 1].
        grid: Retentions at which a layer is measured; the lowest is the least a layer gets.
        predictors: As for `apply_lemo`.
        progress: Show a progress bar.

    Returns:
        The `Allocation`; ``config.agree_across_layers`` is False if it differs between layers.

    Raises:
        ValueError: The budget is none, or below what every layer gets at least; or the model, rows
            or config do not fit.
    """
    check_share("budget", budget)
    for share in grid:
        check_share("grid", share)
    measure = LossRise(model, rows, predictors)
    blocks = measure.num_blocks(config)
    uniform = dataclasses.replace(
        config, retention=float(budget), threshold=None, cuda_graphs=False
    )
    own = dataclasses.replace(uniform, agree_across_layers=False)
    measured = measure(own)
    rules = own.layer_rules(len(measured.retentions))
    sparse = [i for i, rule in enumerate(rules) if rule is not None]
    # The first and the last block are always kept, so a layer has at least two.
    least, even = min(2, blocks), num_kept_blocks(budget, blocks)
    counts = {max(least, num_kept_blocks(share, blocks)) for share in grid} - {even}
    points = {i: {max(least, even): measured.loss_rise} for i in sparse}

    def shares_of(kept: dict[int, int]) -> tuple[float, ...]:
        return tuple(
            1.0 if rule is None else kept[i] / blocks if i in kept else float(budget)
            for i, rule in enumerate(rules)
        )

    total = len(sparse) * len(counts)
    with tqdm(total=total, desc="layers x retentions", disable=not progress) as bar:
        for i in sparse:
            for count in sorted(counts):
                alone = dataclasses.replace(own, retention=shares_of({i: count}))
                points[i][count] = measure(alone).loss_rise
                bar.update()
    shared = shares_of(share_blocks(points, math.floor(round(budget * blocks * len(sparse), 6))))
    allocated = dataclasses.replace(own, retention=shared)
    candidates = {"uniform": uniform, "uniform, a set each": own, "allocated": allocated}
    rises = {name: measure(candidate).loss_rise for name, candidate in candidates.items()}
    return Allocation(
        config=candidates[min(rises, key=lambda name: rises[name])],
        dense_loss=measure.dense_loss,
        loss_rises=rises,
        retentions=shared,
        curves={
            i: {count / blocks: rise for count, rise in sorted(curve.items())}
            for i, curve in points.items()
        },
    )


def allocate_memory(
    model: nn.Module,
    rows: Sequence[Row],
    config: LeMoConfig,
    gib: float,
    *,
    predictors: Any = None,
    progress: bool = True,
) -> Allocation:
    """`allocate_retention` with the largest budget whose training pass fits into ``gib``.

    Args:
        gib: What `training_bytes` may take for the longest row, in GiB.

    Raises:
        ValueError: Not even the least retention fits; see also `allocate_retention`.
    """
    measure = LossRise(model, rows, predictors)  # says what is wrong with the rows, if none
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    budget = retention_for_memory(model, longest, config, gib, predictors=predictors)
    least = max(2 / measure.num_blocks(config), min(GRID))
    grid = GRID if budget >= least else (budget,)
    allocation = allocate_retention(
        model, rows, config, budget, grid=grid, predictors=predictors, progress=progress
    )
    if training_bytes(model, longest, allocation.config, predictors) <= gib * GIB:
        return allocation
    # Checkpointed layers take memory one after the other: the one that keeps most needs most.
    uniform = dataclasses.replace(config, retention=budget, threshold=None)
    return dataclasses.replace(allocation, config=uniform)


def retention_for_memory(
    model: nn.Module, row: Row, config: LeMoConfig, gib: float, *, predictors: Any = None
) -> float:
    """The largest uniform retention whose training pass over ``row`` fits into ``gib``.

    Memory is measured where little is kept and at half, a line through both gives the retention,
    and the memory at that retention is measured too, until it fits: peaks of different parts of a
    pass bend the line upwards.

    Args:
        model: As for `allocate_retention`.
        row: The longest row to train on.
        config: All but retention.
        gib: What `training_bytes` may take, in GiB.
        predictors: As for `apply_lemo`.

    Raises:
        ValueError: Not even one eighth of the blocks fits.
    """

    def memory(retention: float) -> float:
        uniform = dataclasses.replace(config, retention=retention, threshold=None)
        return training_bytes(model, row, uniform, predictors) / GIB

    low, high = min(GRID), 0.5
    low_gib = memory(low)
    if not low_gib <= gib:
        raise ValueError(
            f"{gib:g} GiB is less than a training pass takes at retention {low:g} "
            f"({low_gib:.3g} GiB): use shorter rows, gradient checkpointing, or more memory."
        )
    high_gib = memory(high)
    blocks = -(-len(row["input_ids"]) // config.block_size)
    while True:
        slope = (high_gib - low_gib) / (high - low)
        fits = 1.0 if slope <= 0 else min(1.0, low + (gib - low_gib) / slope)
        fits = max(low, math.floor(fits * blocks + 1e-6) / blocks)
        fits_gib = memory(fits)
        if fits_gib <= gib or fits == low:
            return fits
        high, high_gib = fits, fits_gib


def share_blocks(points: dict[int, dict[int, float]], total: int) -> dict[int, int]:
    """Hand out ``total`` blocks so that the sum of the layers' loss rises is least.

    Args:
        points: By layer: the loss rise by kept blocks; between them lies the lower convex hull.
        total: Blocks of all layers together.

    Returns:
        Blocks by layer, together ``total``, or all that there are.

    Raises:
        ValueError: The layers' least blocks are more than ``total``.
    """
    kept = {layer: min(curve) for layer, curve in points.items()}
    left = total - sum(kept.values())
    if left < 0:
        raise ValueError(
            f"the budget is {total} blocks in {len(points)} layers, but the least that they were "
            f"measured at is {sum(kept.values())}: raise the budget, lower the grid's smallest "
            "retention, or use a smaller block_size."
        )
    segments = []
    for layer, curve in points.items():
        hull = _lower_hull(sorted(curve.items()))
        for (start, before), (end, after) in pairwise(hull):
            segments.append(((after - before) / (end - start), layer, end - start))
    for _, layer, length in sorted(segments):  # a hull's slopes rise, so each layer's come in order
        given = min(length, left)
        kept[layer] += given
        left -= given
    return kept


def _lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` lies in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
