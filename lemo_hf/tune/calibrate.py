"""Calibration of a threshold for each layer: the paper's Algorithm 1 with a fixed mean
retention."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lemo_hf.config import LeMoConfig
from lemo_hf.progress import Estimated
from lemo_hf.tune.measure import LossRise, Measurement, Row

# Beyond this many times the mean score a threshold keeps what must be kept and nothing else.
LARGEST = 1e6
RESCALINGS = 8  # passes over the rows that the factor mostly takes


@dataclass(frozen=True)
class ThresholdCalibration:
    """Calibrated thresholds, and the history of the calibration.

    Attributes:
        config: Config with the thresholds, to train with.
        dense_loss: Loss of the dense model on the calibration rows, nats per label.
        history: Entries for the start and every step that was kept: ``"loss_rise"`` (nats above
            dense, see `LossRise`), ``"retention"`` (mean of the sparse layers) and
            ``"thresholds"``.
    """

    config: LeMoConfig
    dense_loss: float
    history: list[dict[str, Any]]


def calibrate_thresholds(
    model: nn.Module,
    rows: Sequence[Row],
    config: LeMoConfig,
    retention: float,
    *,
    steps: int = 4,
    step_size: float = 0.25,
    epsilon: float = 0.25,
    predictors: Any = None,
    progress: bool = True,
) -> ThresholdCalibration:
    """Find a threshold for each sparse layer, so that together they keep ``retention``.

    Algorithm 1 of the paper starts at each layer's mean block score, which is 1 here, and moves
    each threshold by a finite-difference gradient of validation accuracy. This function takes the
    loss instead, which is finer than accuracy. Both are best if nothing is left out: the paper
    therefore stops early, and this function holds the mean retention of the sparse layers. Steps
    follow the part of the gradient that does not change the retention (``g - c (g·c) / (c·c)``,
    with ``c`` the gradient of retention, known from the same passes), so at the end a kept block is
    worth the same in every layer. After each step all thresholds are scaled by one factor that
    restores the retention. A step that does not lower the loss is undone and halved.

    A step takes two passes over ``rows`` for each layer, and about ten more for the factor.

    Args:
        model: Causal LM or a PEFT model around one, without LeMo on it; unchanged afterwards.
        rows: Calibration rows, ``{"input_ids": [T], "labels": [T]}`` without padding.
        config: Settings, of which all count but retention, threshold and ``cuda_graphs``
            (thresholds allow no graphs).
        retention: Mean share of blocks that the sparse layers' attention keeps, in (0, 1].
        steps: Number of gradient steps; 0 gives all layers one threshold.
        step_size: Change of the threshold that moves most, in the first step.
        epsilon: Step of the finite difference, large enough that blocks cross the threshold within
            it.
        predictors: Predictors as for `apply_lemo`.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: The retention is not in (0, 1], or below what must be kept of the rows; or the
            model, the rows or the config do not fit.

    Source: LeMo, arXiv:2501.09767, Algorithm 1.
    """
    if not 0 < retention <= 1:
        raise ValueError(f"retention must lie in (0, 1], got {retention!r}")
    if config.policy in ("recent", "window"):
        raise ValueError(
            f"policy={config.policy!r} scores blocks by their place, for which no threshold can be "
            "learned: set policy='pooled' or 'oracle', or a predictor."
        )
    base = dataclasses.replace(
        config, retention=None, threshold=0.0, agree_across_layers=False, cuda_graphs=False
    )
    with Estimated(desc="passes over the rows", unit="pass", disable=not progress) as bar:
        bar.expect(2 + RESCALINGS)
        calibration = _Calibration(LossRise(model, rows, predictors), base, retention, bar)
        thresholds, measured = calibration.rescaled(torch.ones(len(calibration.sparse)))
        history = [calibration.entry(thresholds, measured)]
        direction = None
        slopes = 2 * len(calibration.sparse)
        for left in range(steps, 0, -1):
            bar.set_postfix(loss_rise=f"{measured.loss_rise:.4f}")
            bar.expect(left * (slopes + RESCALINGS) - (0 if direction is None else slopes))
            if direction is None:
                direction = calibration.descent(thresholds, epsilon)
            moved = (thresholds + step_size * direction).clamp_min(0)
            moved, after = calibration.rescaled(moved)
            if after.loss_rise < measured.loss_rise:
                thresholds, measured, direction = moved, after, None
                history.append(calibration.entry(thresholds, measured))
            else:
                step_size /= 2
    return ThresholdCalibration(calibration.config(thresholds), calibration.dense_loss, history)


class _Calibration:
    """Thresholds of the sparse layers, ``[S]`` fp32, and measurements with them."""

    def __init__(self, measure: LossRise, base: LeMoConfig, retention: float, bar: Estimated):
        bar.update()  # the dense model's pass
        self._measure, self._bar = measure, bar
        self.dense_loss = measure.dense_loss
        self.retention = retention
        self.base = base
        self.num_layers = len(self.measure(self.base).retentions)
        rules = self.base.layer_rules(self.num_layers)
        self.sparse = [i for i, rule in enumerate(rules) if rule is not None]
        # Two sets that differ by less than half a block a layer are as good.
        self.tolerance = 0.5 / measure.num_blocks(self.base)

    def measure(self, config: LeMoConfig) -> Measurement:
        """A pass over the rows."""
        measured = self._measure(config)
        self._bar.update()
        return measured

    def config(self, thresholds: Tensor) -> LeMoConfig:
        values = [0.0] * self.num_layers
        for i, threshold in zip(self.sparse, thresholds.tolist(), strict=True):
            values[i] = threshold
        return dataclasses.replace(self.base, threshold=tuple(values))

    def mean_retention(self, measured: Measurement) -> float:
        return sum(measured.retentions[i] for i in self.sparse) / len(self.sparse)

    def entry(self, thresholds: Tensor, measured: Measurement) -> dict[str, Any]:
        return {
            "loss_rise": measured.loss_rise,
            "retention": self.mean_retention(measured),
            "thresholds": self.config(thresholds).threshold,
        }

    def rescaled(self, thresholds: Tensor) -> tuple[Tensor, Measurement]:
        """``thresholds`` times the factor that restores the mean retention."""
        tried = {}

        def excess(factor: float) -> float:
            scaled = thresholds * factor
            measured = self.measure(self.config(scaled))
            difference = self.mean_retention(measured) - self.retention
            tried[factor] = abs(difference), scaled, measured
            return difference

        low = high = 1.0
        growth = 1.1
        if excess(1.0) > 0:
            while excess(high := high * growth) > 0:
                low, growth = high, growth**2
                if high > LARGEST:
                    least = self.mean_retention(tried[high][2])
                    raise ValueError(
                        f"retention={self.retention:g} cannot be reached: the first and last block "
                        f"and label blocks are always kept, {least:.3g} of the rows. Ask for a "
                        "higher retention, or use a smaller block_size."
                    )
        else:
            while excess(low := low / growth) < 0 and low > 1 / LARGEST:
                high, growth = low, growth**2
        while min(tried.values(), key=itemgetter(0))[0] > self.tolerance and high / low > 1.001:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        _, scaled, measured = min(tried.values(), key=itemgetter(0))
        return scaled, measured

    def descent(self, thresholds: Tensor, epsilon: float) -> Tensor:
        """Direction of a step: down the loss with retention held, with a largest entry of 1 (or all
        0)."""
        slopes = []
        for place in range(len(self.sparse)):
            step = torch.zeros_like(thresholds)
            step[place] = epsilon
            above = self.measure(self.config(thresholds + step))
            below = self.measure(self.config((thresholds - step).clamp_min(0)))
            kept = self.mean_retention(above) - self.mean_retention(below)
            slopes.append((above.loss_rise - below.loss_rise, kept))
        loss, share = torch.tensor(slopes).unbind(1)
        along = loss - share * (loss @ share) / (share @ share).clamp_min(1e-12)
        return -along / along.abs().max().clamp_min(1e-12)
