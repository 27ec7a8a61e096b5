"""The auxiliary loss that balances the load of experts, over kept tokens.

transformers makes it from all routers' logits after the last layer. Here layers may compute their
experts again and store no logits. In its first run each layer adds to sums, which give the loss
and, up to a factor, the gradient of every logit; its backward adds that gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class RouterLoad:
    """Counts of what the routers of one pass have chosen.

    Args:
        model: Causal LM whose class has this loss.
    """

    def __init__(self, model: Any):
        self._experts, self._chosen = model.num_experts, model.num_experts_per_tok
        self._coefficient = model.router_aux_loss_coef
        # Sums over layers and tokens, and how many these are.
        self._assigned: Tensor | float = 0.0
        self._probability: Tensor | float = 0.0
        self._tokens: Tensor | float = 0.0
        self._complete = False
        self.factor: Tensor | None = None  # of this loss in what is differentiated

    def run(
        self,
        experts: Callable[[Tensor], Tensor],
        router: nn.Module,
        counted: Tensor | None,
        hidden: Tensor,
    ) -> Tensor:
        """``experts(hidden)``, whose router is called once.

        Args:
            experts: Experts of a layer.
            router: Router, which returns logits ``[N, experts]``, the weights of chosen experts,
                and their indices.
            counted: ``[N]`` bool, False at padding and idle slots; None without these.
            hidden: Input of the experts, of N tokens.
        """

        def balance(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # Granite's router of transformers 5.17 returns the logits last, all others first.
            place = 0 if output[0].is_floating_point() else -1
            logits, weights = output[place], output[1]
            if not self._complete:
                self._add(logits.detach(), counted)
            return output[0], _Balanced.apply(weights, logits, counted, self), output[2]

        hook = router.register_forward_hook(balance)
        try:
            return experts(hidden)
        finally:
            hook.remove()

    def _add(self, logits: Tensor, counted: Tensor | None) -> None:
        probability = logits.softmax(-1)
        chosen = probability.topk(self._chosen).indices
        once = torch.ones(len(logits), 1, device=logits.device)
        once = once if counted is None else once * counted[:, None]
        assigned = once.new_zeros(self._experts)
        assigned.scatter_add_(0, chosen.flatten(), once.expand_as(chosen).flatten())
        for name, found in (
            ("_assigned", assigned),
            ("_probability", (probability.float() * once).sum(0)),
            ("_tokens", once.sum()),
        ):
            before = getattr(self, name)  # layers may lie on several devices
            setattr(
                self, name, found + (before.to(found) if isinstance(before, Tensor) else before)
            )

    def loss(self) -> Tensor:
        """The loss as transformers makes it; without a gradient."""
        self._complete = True
        assert isinstance(self._tokens, Tensor)  # a layer has run
        both = torch.as_tensor(self._assigned * self._probability)
        return self._experts * both.sum() / self._tokens.square()

    def added_to(self, loss: Tensor) -> Tensor:
        """Sum of the tokens' ``loss`` and this loss, whose gradient layers add in their
        backward."""
        return _Added.apply(loss, self)

    def gradient(self, logits: Tensor, counted: Tensor | None) -> Tensor:
        """Gradient of the model's loss by the logits, ``[N, experts]``."""
        assert isinstance(self._assigned, Tensor) and isinstance(self._tokens, Tensor)
        assert self.factor is not None  # the backward of the loss ran first
        each = self.factor * self._experts * self._assigned / self._tokens.square()
        probability = logits.softmax(-1).float()
        each = each.to(probability)
        found = probability * (each - (probability * each).sum(-1, keepdim=True))
        return found if counted is None else found * counted[:, None]


class _Added(Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, load: RouterLoad) -> Tensor:
        ctx.load = load
        return loss + load._coefficient * load.loss().to(loss.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.load.factor = ctx.load._coefficient * grad
        return grad, None


class _Balanced(Function):
    """Returns ``weights`` unchanged; the gradient of ``logits`` is that of the auxiliary loss."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, logits: Tensor, counted: Tensor | None, load: RouterLoad
    ) -> Tensor:
        ctx.save_for_backward(logits, counted)
        ctx.load = load
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        logits, counted = ctx.saved_tensors
        return grad, ctx.load.gradient(logits, counted).to(logits.dtype), None, None
