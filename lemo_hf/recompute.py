"""What a layer keeps for its backward, and what it computes again.

Levels, from most stored to least (bytes a kept row of Llama-3 8B in bf16, LoRA on q, k, v, o):

- ``"none"``: what autograd stores (101 KiB).
- ``"mlp"``: the MLP is computed again, a tile of rows at a time (44 KiB).
- ``"selective"``: everything but attention itself is (16 KiB: the rows, and attention's output).
- ``"full"``: everything is (8 KiB: the rows).

At the last two a layer is one `torch.utils.checkpoint` unit around its kept rows. The MLP inside is
not run when the unit is run again: it needs nothing but its input there (`rerun_rows`), and
takes its own backward a tile at a time, so that no more than a tile of its activations exists.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lemo_hf.kernels.rows import add_update
from lemo_hf.offload import HostMemory

# Of an MLP's activations and their gradients that exist at a time, where it is computed again.
TILE_BYTES = 2**30
LEAST_ROWS = 4096  # a tile: smaller matrix products slow down

_ATTENTION = (
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
)
_thread = threading.local()


def checkpointed(
    function: Callable[..., Any],
    rows: Tensor,
    level: str,
    model_checkpoint: Callable | None,
    host: HostMemory | None,
    unit: int,
) -> Any:
    """``function(rows)``, of which ``rows`` are stored, and at ``"selective"`` attention's output.

    Args:
        function: Of the rows alone.
        rows: ``[B, K, H]``.
        level: ``"selective"`` or ``"full"``.
        model_checkpoint: The model's own checkpoint function, or None for PyTorch's.
        host: Where to store, or None for the device. Replaces the model's own function, which may
            offload as well.
        unit: Place in the order of units, for ``host``.
    """
    contexts = partial(_contexts, level, host, unit)
    if host is not None or model_checkpoint is None:
        model_checkpoint = checkpoint
    # Reentrant checkpointing would run a backward inside the backward, which DDP cannot see.
    options = {"use_reentrant": False, "context_fn": contexts}
    stored = nullcontext()
    if host is not None:
        pack = partial(host.put, unit=unit)
        stored = torch.autograd.graph.saved_tensors_hooks(pack, host.get)
    with stored:
        return model_checkpoint(function, rows, **options)


def _contexts(level: str, host: HostMemory | None, unit: int):
    """What holds while a unit runs, and while it runs again."""
    if level == "full":
        return nullcontext(), _running_again(None)
    kept: list = []
    return _KeepAttention(kept, host, unit), _running_again(_ReuseAttention(kept, host))


@contextmanager
def _running_again(mode: TorchDispatchMode | None):
    _thread.again = True
    try:
        with mode or nullcontext():
            yield
    finally:
        _thread.again = False


class _KeepAttention(TorchDispatchMode):
    """Keeps what attention operators return."""

    def __init__(self, kept: list, host: HostMemory | None, unit: int):
        super().__init__()
        self.kept, self.host, self.unit = kept, host, unit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in _ATTENTION:
            put = self.host.put if self.host else lambda tensor, unit: tensor
            self.kept.append([put(x, self.unit) if torch.is_tensor(x) else x for x in out])
        return out


class _ReuseAttention(TorchDispatchMode):
    """Hands that out, in the same order, in place of running them again."""

    def __init__(self, kept: list, host: HostMemory | None):
        super().__init__()
        self.kept, self.host = kept, host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name not in _ATTENTION:
            return func(*args, **(kwargs or {}))
        return tuple(self.host.get(x) if self.host else x for x in self.kept.pop(0))


class _Rerun(Function):
    """See `rerun_rows`."""

    @staticmethod
    def forward(ctx, run, tile, behind, rows, update, scale, *parameters):
        total = add_update(rows, update, scale)
        total = total.detach() if update is None else total.to(rows.dtype)
        ctx.save_for_backward(total)
        ctx.run, ctx.tile, ctx.parameters = run, tile, parameters
        ctx.scale, ctx.update_dtype = scale, None if update is None else update.dtype
        kind = total.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.rng = _rng_state(total.device)
        if getattr(_thread, "again", False):
            # Nobody reads what a unit that runs again returns.
            out = total.new_empty(()).expand_as(total)
        else:
            flat = total.view(1, -1, total.shape[-1])
            tiles = [run(part)[0 if behind else 1] for part in flat.split(tile, 1)]
            out = tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)
            out = out.view_as(total)
        ctx.behind = behind
        return (out, None) if behind else (total, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_out):
        (total,) = ctx.saved_tensors
        grad_rows = torch.empty_like(total)
        flat, out = (x.view(1, -1, total.shape[-1]) for x in (total, grad_rows))
        grads = [grad_total] if ctx.behind else [grad_total, grad_out]
        grads = [x.reshape(1, -1, total.shape[-1]) for x in grads]
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        kind, dtype, enabled = ctx.autocast
        with _restored(ctx.rng, total.device), torch.autocast(kind, dtype=dtype, enabled=enabled):
            for start in range(0, flat.shape[1], ctx.tile):
                part = slice(start, start + ctx.tile)
                with torch.enable_grad():
                    rows = flat[:, part].detach().requires_grad_()
                    outputs = [x for x in ctx.run(rows) if x is not None]
                wanted = (rows, *ctx.parameters)
                seeds = [x[:, part] for x in grads]
                seeds = [x.to(y.dtype) for x, y in zip(seeds, outputs, strict=True)]
                found = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
                out[:, part] = found[0]
                for i, grad in enumerate(found[1:]):
                    if grad is not None:
                        sums[i] = grad if sums[i] is None else sums[i].float().add_(grad)
                del outputs, found
        grad_update = None
        if ctx.update_dtype is not None:
            grad_update = grad_rows if ctx.scale == 1 else grad_rows * ctx.scale
            grad_update = grad_update.to(ctx.update_dtype)
        sums = [
            x if x is None else x.to(p.dtype) for x, p in zip(sums, ctx.parameters, strict=True)
        ]
        return None, None, None, grad_rows, grad_update, None, *sums


def rerun_rows(
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    modules: Sequence[nn.Module],
    rows: Tensor,
    update: Tensor | None,
    scale: float,
    width: int | None,
    behind: bool,
) -> tuple[Tensor, Tensor | None]:
    """``run`` on ``total = rows + scale * update``, which is stored alone.

    Args:
        run: Maps rows ``[1, R, H]`` to these rows, handed on, and an update of each ``[1, R, H]``
            that depends on no other row; or to new rows and None.
        modules: Hold the parameters that ``run`` uses.
        rows: ``[B, K, H]``.
        update: ``[B, K, H]``, or None for 0.
        scale: Of the update.
        width: Of the widest activation inside, in elements, for the size of a tile; None: one tile.
        behind: ``run`` gives new rows and None (a norm stands behind the addition).

    Returns:
        ``total`` and the update of each of its rows, both ``[B, K, H]``; or new rows and None.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    tile = tile_rows(rows, width)
    return _Rerun.apply(run, tile, behind, rows, update, scale, *parameters)


class _GradientAlone(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.new_empty(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad @ ctx.weight.to(grad.dtype), None


def gradient_alone(x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``x @ weight.T`` for ``x [..., I]``, ``weight [H, I]``, without its values.

    Returns:
        ``[..., H]`` that nobody may read.
    """
    return _GradientAlone.apply(x, weight)


def tile_rows(rows: Tensor, width: int | None) -> int:
    """Rows of a tile: gate, up, their product and two gradients take `TILE_BYTES`."""
    whole = rows.shape[0] * rows.shape[1]
    if width is None:
        return whole
    fitting = TILE_BYTES // (5 * width * rows.element_size())
    return min(whole, max(LEAST_ROWS, fitting // 256 * 256))


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


@contextmanager
def _restored(state: tuple[Tensor, Tensor | None], device: torch.device):
    """Random numbers as they were then, so that dropout drops the same."""
    with torch.random.fork_rng([device] if state[1] is not None else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
