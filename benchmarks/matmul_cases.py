"""What `bench_kernels.py` measures of the kernel around matrix products: the loss."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from kernel_cases import DEVICE, Call, Case, normal
from torch import Tensor, nn

from lemo_hf.kernels.segment_cross_entropy import segment_cross_entropy

ROWS, WIDTH = 32768, 4096
VOCABULARIES = (128256, 32000)
PEAK = 9.0  # target's weight added to a row of hidden: most of the softmax falls on the target
CHECKED = 256  # rows of each gradient that are compared with fp64
CHUNK = 1024  # rows of fp64 logits


def loss_cases() -> Iterator[Case]:
    """Loss and gradients of a head, with random and with peaked logits."""
    variants = [(size, trained, False) for trained in (False, True) for size in VOCABULARIES]
    for vocabulary, trained, peaked in [*variants, (VOCABULARIES[0], False, True)]:
        head = nn.Linear(WIDTH, vocabulary, bias=False, dtype=torch.bfloat16, device=DEVICE)
        nn.init.normal_(head.weight, std=0.02)
        head.requires_grad_(trained)
        targets = torch.randint(vocabulary, (ROWS,), device=DEVICE)
        hidden = normal(ROWS, WIDTH)
        if peaked:
            hidden += PEAK * head.weight.detach()[targets]
        providers = loss_providers(hidden.requires_grad_(), targets, head)
        parts = [f"V = {vocabulary:,}", "head trained" if trained else "head frozen"]
        products = 3 if trained else 2  # logits, gradient of hidden, gradient of the weight
        yield Case(
            "segment_cross_entropy",
            f"N = {ROWS:,}, H = {WIDTH:,}, loss and gradients",
            ", ".join([*parts, "peaked"] if peaked else parts),
            providers,
            flops=dict.fromkeys(providers, 2.0 * products * ROWS * WIDTH * vocabulary),
            grad=True,
            inspect=partial(errors, cache(partial(truth, hidden, targets, head.weight))),
        )


def loss_providers(
    hidden: Tensor, targets: Tensor, head: nn.Linear
) -> dict[str, Callable[[], Call]]:
    """Each call returns loss, gradient of hidden and, if the head is trained, of its weight."""
    weight = head.weight
    parameters = [weight] if weight.requires_grad else []

    def with_gradients(loss: Callable[[], Tensor]) -> Call:
        def call() -> tuple[Tensor, ...]:
            total = loss()
            return total.detach(), *torch.autograd.grad(total, [hidden, *parameters])

        return call

    def lemo() -> Call:
        ones = torch.ones(len(targets), device=targets.device)
        loss = partial(segment_cross_entropy, hidden, targets, ones, head, parameters=parameters)
        return with_gradients(loss)

    def hf() -> Call:
        loss = partial(nn.functional.cross_entropy, target=targets, reduction="sum")
        return with_gradients(lambda: loss(head(hidden).float()))

    def liger(accum_dtype: torch.dtype | None = None) -> Call:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options = {"reduction": "sum", "accum_dtype": accum_dtype}
        loss = partial(liger_fused_linear_cross_entropy, hidden, weight, targets, **options)
        return with_gradients(loss)

    def cce(**options) -> Call:
        from cut_cross_entropy import linear_cross_entropy

        options = {"reduction": "sum", "impl": "cce", **options}
        return with_gradients(partial(linear_cross_entropy, hidden, weight, targets, **options))

    providers = {"lemo": lemo, "HF": hf, "Liger": liger}
    if parameters:  # Liger adds up the gradient of a bf16 weight in bf16, lemo in fp32
        providers["Liger, fp32 sums"] = partial(liger, torch.float32)
    return {**providers, "CCE": cce, "CCE, no filter": partial(cce, filter_eps=None)}


@torch.no_grad()
def truth(hidden: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and the first `CHECKED` rows of each gradient, in fp64."""
    wide = weight.double()
    loss, grad_weight = 0.0, 0.0
    for start in range(0, len(hidden), CHUNK):
        rows, labels = hidden[start : start + CHUNK].double(), targets[start : start + CHUNK]
        logits = rows @ wide.T
        log_z = logits.logsumexp(1, keepdim=True)
        loss += (log_z - logits.gather(1, labels[:, None])).sum()
        tokens = torch.arange(min(CHECKED, len(weight)), device=labels.device)
        share = (logits[:, : len(tokens)] - log_z).exp() - (labels[:, None] == tokens).double()
        grad_weight += share.T @ rows
        if start == 0:
            share = (logits[:CHECKED] - log_z[:CHECKED]).exp()
            share[torch.arange(len(share)), labels[:CHECKED]] -= 1
            grad_hidden = share @ wide
    return loss, grad_hidden, grad_weight


def errors(true: Callable[[], tuple[Tensor, ...]], call: Call) -> dict[str, float]:
    """How far a provider's loss and gradients are from fp64, relative, by the Euclidean norm."""
    names = ("loss_error", "grad_error", "weight_error")
    found = {}
    for name, actual, expected in zip(names, call(), true(), strict=False):
        actual = actual if actual.dim() == 0 else actual[: len(expected)]
        difference = (actual.double() - expected).norm() / expected.norm()
        found[name] = float(f"{difference:.3g}")
    return found
