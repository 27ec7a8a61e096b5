"""Fitting a predictor to target scores: losses, and pruning of dead ReLU units while it learns.

Source: LeMo, arXiv:2501.09767, "Context-aware Pattern Prediction" (elastic size transformation).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lemo_hf.predictors.block_predictor import BlockPredictor

# Where a unit is a row or a column: parameter, dimension.
UNITS = {"embed.weight": 0, "embed.bias": 0, "key.weight": 1, "query.weight": 1}
# Retentions at whose boundary the ranking loss asks which side a block is on.
BOUNDARIES = (0.15, 0.3, 0.5, 0.7)
# Of the ranking loss, in standard deviations of the target: how near the boundary matters.
MARGIN = 0.1


def regression(scores: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Squared error of standardised logarithms, as the paper regresses the score. ``[B]``."""
    return ((scores - target) ** 2 * real).sum(1) / real.sum(1).clamp_min(1)


def ranking(scores: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Regression, and for each block the side of the boundary that a retention draws. ``[B]``."""
    loss = regression(scores, target, real)
    count = real.sum(1, keepdim=True)
    low = target.detach().masked_fill(~real, -math.inf)
    order = low.argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    ordered = scores.detach().masked_fill(~real, -math.inf).sort(1, descending=True).values
    for retention in BOUNDARIES:
        budget = (retention * count).ceil().long().clamp_min(1)
        last, next_ = (
            ordered.gather(1, (budget - 1 + step).clamp_max(ordered.shape[1] - 1))
            for step in (0, 1)
        )
        boundary = torch.where(next_.isfinite(), (last + next_) / 2, last)
        side = nn.functional.binary_cross_entropy_with_logits(
            (scores - boundary) / MARGIN, (rank < budget).float(), reduction="none"
        )
        loss = loss + 0.5 * (side * real).sum(1) / count[:, 0].clamp_min(1)
    return loss


def distillation(scores: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Divergence of the blocks' shares of the row's score. ``[B]``."""
    log_shares = (2 * scores).masked_fill(~real, -1e9).log_softmax(1)
    shares = (2 * target).masked_fill(~real, -1e9).softmax(1)
    return nn.functional.kl_div(log_shares, shares, reduction="none").sum(1) * 3


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ranking": ranking,
    "regression": regression,
    "distillation": distillation,
}


def standardised(scores: Tensor, target: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Both less their row's mean, in units of the target's deviation; 0 where nothing is real.

    Args:
        scores: ``[B, N]`` predicted logarithms.
        target: ``[B, N]`` scores, at least 0; logarithms of them are taken.
        real: ``[B, N]`` bool: blocks that hold tokens.
    """
    count = real.sum(1, keepdim=True).clamp_min(1)
    # A block that nobody wants: far below the mean, but not infinitely.
    floor = 1e-3 * (target * real).sum(1, keepdim=True) / count
    target = torch.maximum(target, floor.clamp_min(1e-30)).log()
    scores, target = (
        (x - (x.masked_fill(~real, 0).sum(1, keepdim=True) / count)).masked_fill(~real, 0)
        for x in (scores, target)
    )
    deviation = (target.square().sum(1, keepdim=True) / count).sqrt().clamp_min(1e-6)
    return scores / deviation, target / deviation


class Fit:
    """One predictor, its optimizer, and how often its units fired.

    Args:
        predictor: Trained in place.
        lr: Of the first step; the caller lowers it by `set_lr`.
        loss: Key of `LOSSES`.
    """

    def __init__(self, predictor: BlockPredictor, lr: float, loss: str = "ranking"):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {tuple(LOSSES)}, got {loss!r}")
        self.predictor, self.loss = predictor, LOSSES[loss]
        cuda = predictor.embed.weight.is_cuda
        self.optimizer = torch.optim.AdamW(
            predictor.parameters(), lr=lr, weight_decay=0.01, fused=cuda
        )
        self.fired = torch.zeros_like(predictor.embed.bias.detach())
        self.seen = 0
        predictor.embed.register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: tuple, units: Tensor) -> None:
        self.fired += (units.detach() > 0).flatten(0, -2).sum(0)
        self.seen += units[..., 0].numel()

    def backward(self, rows: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """Add the gradient of a batch; its loss, a scalar tensor without graph.

        Args:
            rows: ``[B, T, H]``, the sublayer's normed input.
            target: ``[B, N]`` scores of its blocks, at least 0.
            valid: ``[B, T]`` bool, False at padding, or None.
        """
        embedded = self.predictor.embed_rows(rows, valid)
        real = embedded.valid.any(2)
        scores = self.predictor.score(embedded)
        loss = self.loss(*standardised(scores, target, real), real).mean()
        loss.backward()
        return loss.detach()

    def step(self, lr: float) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def prune(self, rarely: float) -> int:
        """Take out units that fired on less than ``rarely`` of the tokens since the last call.

        Their rows and columns leave the weights and the optimizer's moments. One unit stays.

        Returns:
            How many went.
        """
        if not self.seen:
            return 0
        share = self.fired / self.seen
        stay = share >= rarely
        stay[share.argmax()] = True
        index = stay.nonzero()[:, 0]
        for name, parameter in list(self.predictor.named_parameters()):
            if name not in UNITS:
                continue
            small = nn.Parameter(parameter.detach().index_select(UNITS[name], index))
            self.optimizer.state[small] = {
                key: value.index_select(UNITS[name], index) if value.dim() else value
                for key, value in self.optimizer.state.pop(parameter, {}).items()
            }
            owner, _, leaf = name.partition(".")
            setattr(self.predictor.get_submodule(owner), leaf, small)
        self.predictor.set_units(len(index))
        self.optimizer.param_groups[0]["params"] = list(self.predictor.parameters())
        self.fired, self.seen = torch.zeros_like(share[stay]), 0
        return len(stay) - len(index)
