"""What `bench_kernels.py` measures of kernels around matrix products: block scores and the loss."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from kernel_cases import DEVICE, HEAD_DIM, HEADS, KEY_HEADS, Call, Case, DoesNotFit, normal
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lemo_hf.kernels.block_scores import block_scores
from lemo_hf.kernels.segment_cross_entropy import segment_cross_entropy

LENGTHS = {16384: (64, 16, 512), 65536: (64,), 131072: (64,)}  # tokens: sizes of a block
ROOM = 100e9  # bytes of scores that still fit
ROWS, WIDTH = 32768, 4096
VOCABULARIES = (128256, 32000)
PEAK = 9.0  # target's weight added to a row of hidden: most of the softmax falls on the target
CHECKED = 256  # rows of each gradient that are compared with fp64
CHUNK = 1024  # rows of fp64 logits


def all_scores(query: Tensor, key: Tensor, block_size: int, scaling: float) -> Tensor:
    """The definition of `block_scores` with fp32 scores ``[heads, T, T]`` of one sequence."""
    if query.is_cuda:
        pairs = torch.bmm(query[0], key[0].mT, out_dtype=torch.float32)
    else:
        pairs = query[0].float() @ key[0].float().mT
    mean = pairs.mul_(scaling).clamp_min_(0).mean(0).tril_()
    blocks = len(mean) // block_size
    return mean.view(blocks, block_size, blocks, block_size).amax((1, 3)).sum(0)


def score_cases() -> Iterator[Case]:
    """Scores against the whole matrix of them, and against an attention over the same tokens."""
    shape = f"{HEADS} query and {KEY_HEADS} key heads of {HEAD_DIM}"
    scaling = HEAD_DIM**-0.5
    for tokens, sizes in LENGTHS.items():
        query = normal(1, tokens, HEADS, HEAD_DIM).transpose(1, 2)
        key, value = (normal(1, tokens, KEY_HEADS, HEAD_DIM).transpose(1, 2) for _ in range(2))
        wide_key, wide_value = (
            part.repeat_interleave(HEADS // KEY_HEADS, 1) for part in (key, value)
        )
        scores_bytes = 4 * HEADS * tokens**2

        def materialised(block_size, query=query, key=wide_key, scores_bytes=scores_bytes) -> Call:
            if scores_bytes > ROOM:
                raise DoesNotFit(f"does not fit: {scores_bytes / 2**30:,.0f} GiB of scores")
            return partial(all_scores, query, key, block_size, scaling)

        def attention(backend, query=query, key=wide_key, value=wide_value) -> Call:
            def attend() -> Tensor:
                with sdpa_kernel(backend):
                    attend = nn.functional.scaled_dot_product_attention
                    return attend(query, key, value, is_causal=True)

            return attend

        causal = HEADS * HEAD_DIM * tokens**2  # operations of QK^T, half of the pairs
        for block_size in sizes:
            ours = partial(block_scores, query, key, block_size, scaling)
            providers = {
                "lemo": lambda ours=ours: ours,
                "all scores": partial(materialised, block_size),
            }
            if block_size == sizes[0]:  # attention knows no blocks
                providers["FlashAttention"] = partial(attention, SDPBackend.FLASH_ATTENTION)
                providers["cuDNN attention"] = partial(attention, SDPBackend.CUDNN_ATTENTION)
            flops = {**dict.fromkeys(providers, 2 * causal), "lemo": causal}
            size = {"materialised_mib": scores_bytes // 2**20}
            name = f"T = {tokens:,}, b = {block_size}"
            yield Case(
                "block_scores", shape, name, providers, flops=flops, inspect=lambda _, s=size: s
            )


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
