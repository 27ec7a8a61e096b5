"""What `bench_kernels.py` measures of kernels bound by memory traffic, and what they stand against.

A provider is a function that imports what it needs and returns the call to time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from lemo_hf.kernels.gated_activation import gated_activation
from lemo_hf.kernels.gather_norm import gather_norm
from lemo_hf.kernels.norm import Norm, launch_backward, launch_forward
from lemo_hf.kernels.rotary import KeptRotary, rotary
from lemo_hf.kernels.scatter_add import scatter_add_

DEVICE = "cuda"
TOKENS, KEPT, WIDTH = 65536, 32768, 4096
BLOCK = 64
EPS = 1e-5
HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
MLP_ROWS, MLP_WIDTH = 16384, 14336

Call = Callable[[], Any]


class DoesNotFit(Exception):
    """A provider needs more memory than there is, so it is not tried; says how much."""


@dataclass
class Case:
    """One operation, and who does it.

    Attributes:
        kernel: A key of `bench_kernels.KERNELS`.
        shape: What all cases of the kernel have in common.
        name: What sets this one apart.
        providers: Make the call to time, by the provider's name.
        elements: bf16 elements that the operation must at least move, or None.
        flops: Floating-point operations by provider.
        grad: Whether autograd records the calls.
        inspect: Further fields of a row, from a provider's call.
    """

    kernel: str
    shape: str
    name: str
    providers: dict[str, Callable[[], Call]]
    elements: int | None = None
    flops: dict[str, float] = field(default_factory=dict)
    grad: bool = False
    inspect: Callable[[Call], dict[str, float]] | None = None


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers of variance 1."""
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def kept_blocks() -> Tensor:
    """``[1, KEPT]`` ascending positions: random blocks of `BLOCK` tokens."""
    blocks = torch.randperm(TOKENS // BLOCK, device=DEVICE)[: KEPT // BLOCK].sort().values
    return (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=DEVICE)).flatten()[None]


def row_shape() -> str:
    """Tokens, kept tokens and width."""
    return f"T = {TOKENS:,}, K = {KEPT:,} in blocks of {BLOCK}, H = {WIDTH:,}"


def row_cases() -> Iterator[Case]:
    """Each kernel that moves rows of the stream, by itself."""
    x, keep = normal(1, TOKENS, WIDTH), kept_blocks()
    rows, update, grad_rows, grad_hidden, out = (normal(1, KEPT, WIDTH) for _ in range(5))
    norm = Norm("rms", normal(WIDTH), None, EPS)
    back = partial(launch_backward, grad_rows, grad_hidden, rows, norm)
    calls = {  # elements in units of K * H
        "gather_norm, forward": (3, partial(launch_forward, x, keep, norm)),
        "gather_norm, backward": (4, partial(back, x, keep)),
        "gather_norm, backward with weight": (4, partial(back, x, keep, grad_weight=True)),
        "add_norm, forward": (4, partial(launch_forward, rows, None, norm, update=update)),
        "add_norm, backward": (4, partial(back, out)),
        "scatter_add_, forward": (3, partial(scatter_add_, x, rows, update, keep)),
        "scatter_add_, backward": (2, partial(launch_forward, x, keep, None)),
    }
    for name, (times, call) in calls.items():
        elements = times * KEPT * WIDTH
        yield Case("rows", row_shape(), name, {"lemo": lambda call=call: call}, elements)


class _Stream(Function):
    """A stream that is updated in place, call after call, as something gradients flow through."""

    @staticmethod
    def forward(ctx, anchor, x):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad_x):
        return None, None


def movement_cases() -> Iterator[Case]:
    """Out of the stream, through a norm, and back: all of a sublayer but attention or MLP.

    lemo updates one stream and one gradient stream in place, as in a run of sparse layers. The
    others make a new stream and a new gradient, which is what autograd does with the paper's code.
    """
    x, keep, grad = normal(1, TOKENS, WIDTH), kept_blocks(), normal(1, TOKENS, WIDTH)
    anchor = torch.zeros(1, device=DEVICE, requires_grad=True)
    leaf = x.detach().requires_grad_()
    weight = torch.ones(WIDTH, dtype=torch.bfloat16, device=DEVICE)
    norm = Norm("rms", weight, None, EPS)

    def in_place(stream: Tensor) -> Tensor:
        stream, rows, hidden = gather_norm(stream, keep, norm)
        return scatter_add_(stream, rows, hidden, keep)

    def in_place_and_back() -> None:
        stream = in_place(_Stream.apply(anchor, x.detach()))
        torch.autograd.grad(stream, anchor, grad, allow_unused=True)

    def naive() -> Callable[[Tensor], Tensor]:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        llama_norm = LlamaRMSNorm(WIDTH, EPS).to(DEVICE, torch.bfloat16).requires_grad_(False)

        def move(stream: Tensor) -> Tensor:
            hidden = llama_norm(stream.index_select(1, keep[0]))
            return stream + torch.zeros_like(stream).index_copy_(1, keep[0], hidden)

        return move

    def compiled() -> Callable[[Tensor], Tensor]:
        return torch.compile(naive(), dynamic=False)

    def there_and_back(move: Callable[[Tensor], Tensor]) -> Call:
        return lambda: torch.autograd.grad(move(leaf), leaf, grad)

    forward = {
        "lemo": lambda: partial(in_place, x),
        "naive": lambda: partial(naive(), x),
        "torch.compile": lambda: partial(compiled(), x),
    }
    yield Case("movement", row_shape(), "forward", forward, 6 * KEPT * WIDTH)
    both = {
        "lemo": lambda: in_place_and_back,
        "naive": lambda: there_and_back(naive()),
        "torch.compile": lambda: there_and_back(compiled()),
    }
    name = "forward + backward"
    yield Case("movement", row_shape(), name, both, 12 * KEPT * WIDTH, grad=True)


def saved_mib(call: Call) -> dict[str, float]:
    """MiB of the tensors that ``call`` saves for its backward, inputs included."""
    sizes = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        call()
    return {"saved_mib": round(sum(sizes.values()) / 2**20, 1)}


def gated_cases() -> Iterator[Case]:
    """SwiGLU between the projections of an MLP. Liger's backward overwrites gate and up."""
    gate, up = (normal(MLP_ROWS, MLP_WIDTH).requires_grad_() for _ in range(2))
    grad = normal(MLP_ROWS, MLP_WIDTH)
    own = [part.detach().clone().requires_grad_() for part in (gate, up)]  # Liger's to overwrite

    def lemo() -> Call:
        return partial(gated_activation, gate, up, "silu")

    def hf() -> Call:
        return lambda: nn.functional.silu(gate) * up

    def liger() -> Call:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return partial(LigerSiLUMulFunction.apply, *own)

    def and_back(build: Callable[[], Call], inputs: list[Tensor]) -> Call:
        forward = build()
        return lambda: torch.autograd.grad(forward(), inputs, grad)

    shape = f"K = {MLP_ROWS:,}, I = {MLP_WIDTH:,}, silu"
    size = MLP_ROWS * MLP_WIDTH
    forward = {"lemo": lemo, "HF": hf, "Liger": liger}
    yield Case("gated_activation", shape, "forward", forward, 3 * size)
    both = {
        "lemo": lambda: and_back(lemo, [gate, up]),
        "HF": lambda: and_back(hf, [gate, up]),
        "Liger": lambda: and_back(liger, own),
    }
    name = "forward + backward"
    yield Case("gated_activation", shape, name, both, 8 * size, grad=True, inspect=saved_mib)


def rotary_cases() -> Iterator[Case]:
    """Queries and keys of kept tokens. Liger rotates them, and their gradients, in place."""

    def heads(count: int) -> Tensor:  # as projections return them: [1, heads, K, D]
        return normal(1, KEPT, count, HEAD_DIM).transpose(1, 2)

    query, key = heads(HEADS).requires_grad_(), heads(KEY_HEADS).requires_grad_()
    own = [part.detach().clone().requires_grad_() for part in (query, key)]  # Liger's to overwrite
    grads = [heads(HEADS), heads(KEY_HEADS)]
    own_grads = [part.clone() for part in grads]
    keep = kept_blocks()
    frequencies = 500000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM)
    angles = (torch.arange(TOKENS, device=DEVICE)[:, None] * frequencies).repeat(1, 2)[None]
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def gathered() -> list[Tensor]:
        return [table.index_select(1, keep[0]) for table in (cos, sin)]

    def lemo() -> Call:
        tables = [KeptRotary(table, keep) for table in (cos, sin)]
        return lambda: rotary(query, key, *tables)

    def hf() -> Call:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        return lambda: apply_rotary_pos_emb(query, key, *gathered())

    def liger() -> Call:
        from liger_kernel.ops.rope import LigerRopeFunction

        return lambda: LigerRopeFunction.apply(*own, *gathered())

    def and_back(build: Callable[[], Call], inputs: list[Tensor], grads: list[Tensor]) -> Call:
        forward = build()
        return lambda: torch.autograd.grad(forward(), inputs, grads)

    shape = f"K = {KEPT:,} of T = {TOKENS:,}, {HEADS} query and {KEY_HEADS} key heads of {HEAD_DIM}"
    size = 2 * KEPT * (HEADS + KEY_HEADS) * HEAD_DIM
    forward = {"lemo": lemo, "HF": hf, "Liger": liger}
    yield Case("rotary", shape, "forward", forward, size)
    both = {
        "lemo": lambda: and_back(lemo, [query, key], grads),
        "HF": lambda: and_back(hf, [query, key], grads),
        "Liger": lambda: and_back(liger, own, own_grads),
    }
    yield Case("rotary", shape, "forward + backward", both, 2 * size, grad=True)
