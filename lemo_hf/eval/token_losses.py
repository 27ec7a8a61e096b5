"""The loss of each token under a causal LM, with logits of one segment of tokens at a time."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lemo_hf.kernels.segment_cross_entropy import choose_segment_size
from lemo_hf.kernels.segment_losses import segment_losses_
from lemo_hf.patch import input_device, transformers_model


class TokenLosses:
    """Next-token losses of one model, of any architecture and dtype.

    Most causal LMs make their logits token by token: a head, then a divisor or a soft cap. A trial
    on two tokens, with known numbers in place of the head's output, shows whether this model does.
    If so, the head gets only tokens whose loss is wanted, a segment at a time, and no ``[B, T, V]``
    exists. Any other model makes its own logits, from the first wanted token on.

    Args:
        model: Causal LM or a PEFT model around one, in evaluation mode.

    Attributes:
        head: Output embeddings if they run by segments, else None.
        device: Device on which token ids must be.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        inner = transformers_model(model)
        self.device = input_device(model)
        self.rule = _logits_rule(inner.config)
        head = inner.get_output_embeddings()
        # A head that FSDP shards by itself is whole only within its own call.
        usable = head is not None and not isinstance(head, FSDPModule)
        self.head = head if usable and _rule_holds(model, head, self.rule, self.device) else None
        self._cuts_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters

    @torch.no_grad()
    def __call__(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Losses of the tokens that are ``wanted``, each predicted from all tokens before it.

        Args:
            ids: Token ids, ``[B, T]`` int64 without padding, on the model's device.
            wanted: Tokens whose loss is wanted, ``[B, T]`` bool on the same device; nothing
                predicts a row's first token.

        Returns:
            ``[N]`` losses in nats in the order of ``ids[wanted]``, fp32 or the model's own dtype if
            wider.
        """
        targets = ids[wanted]
        # The hidden state of a token predicts the next: everything else is one place to the left.
        asked = nn.functional.pad(wanted[:, 1:], (0, 1))
        if self.head is None:
            first = int(asked.any(0).nonzero()[0])
            keep = {"logits_to_keep": ids.shape[1] - first} if self._cuts_logits else {}
            logits = self.model(input_ids=ids, use_cache=False, **keep).logits
            # Counted from the end: a prompt that PEFT puts before the ids has logits too.
            logits, asked = logits[:, -(ids.shape[1] - first) :], asked[:, first:]
            return _losses(logits, asked, targets, lambda rows: rows, {})
        head, losses = self.head, list[Tensor]()

        def before_head(_: nn.Module, args: tuple) -> tuple:
            handle.remove()
            losses.append(_losses(args[0], asked, targets, head, self.rule))
            return (args[0][:, :1],)

        handle = head.register_forward_pre_hook(before_head)
        try:
            self.model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        return losses[0]


def _losses(
    inputs: Tensor,
    asked: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    rule: dict[str, Any],
) -> Tensor:
    """Losses of ``targets [N]``; ``head`` maps the ``asked`` rows of its input to logits."""
    rows = inputs.flatten(0, 1)
    places = asked.flatten().nonzero().squeeze(1).to(rows.device)
    size = choose_segment_size(rows, getattr(head, "out_features", None), trained=False)
    losses = []
    for part, answer in zip(places.split(size), targets.split(size), strict=True):
        logits = head(rows.index_select(0, part))
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = torch.empty(len(part), dtype=wide, device=logits.device)
        weights = torch.ones_like(loss, dtype=torch.float32)
        answer = answer.to(logits.device)
        segment_losses_(logits, answer, weights, loss, **rule, gradient=False)
        losses.append(loss)
        del logits  # or they would stay until the next segment's exist
    return torch.cat(losses)


def _logits_rule(config: Any) -> dict[str, Any]:
    """The divisor and the soft cap that a model's config names, as `segment_losses_` takes them."""
    config = config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    softcap = getattr(config, "final_logit_softcapping", None) or None  # Gemma
    return {"divisor": divisor / scale, "softcap": softcap}


@torch.no_grad()
def _rule_holds(
    model: nn.Module, head: nn.Module, rule: dict[str, Any], device: torch.device
) -> bool:
    """Whether ``rule``, applied to the head's output, gives the model's own logits."""
    calls = []

    def replace(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        numbers = torch.linspace(-60, 60, output.numel(), device=output.device)
        calls.append((args[0].shape[:-1] if args else None, numbers.view(output.shape)))
        return calls[-1][1]

    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    handle = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0][0] != ids.shape or logits.shape != calls[0][1].shape:
        return False
    expected = calls[0][1] / rule["divisor"]
    if rule["softcap"]:
        expected = (expected / rule["softcap"]).tanh() * rule["softcap"]
    return torch.allclose(logits.to(expected), expected, rtol=1e-4, atol=1e-4)
