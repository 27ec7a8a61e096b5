"""What a layer stores for its backward, and what it computes again.

Levels, from most stored to least (bytes a kept row of Llama-3 8B in bf16, LoRA on q, k, v, o):

- ``"none"``: what autograd stores (100 KiB).
- ``"mlp"``: the MLP is computed again, a tile of rows at a time (44 KiB).
- ``"selective"``: everything but attention and its output projection is (24 KiB: the rows,
  attention's output before that projection, and the sum of rows and update after it).
- ``"lean"``: everything but attention is (16 KiB: without that sum).
- ``"full"``: everything is (8 KiB: the rows).

At the last three levels a layer is one `torch.utils.checkpoint` unit around its kept rows. When the
unit runs again, the MLP inside does not: it needs only its input there (`rerun_rows`), and runs its
own backward a tile at a time, so that only one tile of its activations exists.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lemo_hf.kernels.rows import add_update
from lemo_hf.memory.offload import HostMemory, Stored

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


def checkpointed(
    function: Callable[..., Any],
    rows: Tensor,
    level: str,
    model_checkpoint: Callable | None,
    host: HostMemory | None,
    number: int,
) -> Any:
    """Call ``function(rows, unit=...)``, and store only ``rows`` and what the `Unit` keeps.

    Args:
        function: Function of the rows, which also gets the unit that runs, or runs again.
        rows: ``[B, K, H]``.
        level: Level of recomputation, one of `UNITS`.
        model_checkpoint: Checkpoint function of the model; None: PyTorch's.
        host: Pinned host memory to store in; None: the device. It replaces the model's own
            function, which may offload too.
        number: Number of the unit, in their order, for ``host``.
    """
    unit = Unit(level, host, number)
    stored: AbstractContextManager[Any] = nullcontext()
    if host is not None:
        model_checkpoint = checkpoint
        stored = torch.autograd.graph.saved_tensors_hooks(partial(host.put, unit=number), host.get)

    def contexts() -> tuple[_Running, _Running]:
        return _Running(unit, again=False), _Running(unit, again=True)

    options: dict[str, Any] = {"preserve_rng_state": False} if _captured(rows.device) else {}
    # Reentrant checkpointing would run a backward inside the backward, which DDP cannot see.
    with stored:
        return (model_checkpoint or checkpoint)(
            partial(function, unit=unit),
            rows,
            use_reentrant=False,
            context_fn=contexts,
            **options,
        )


class Unit:
    """One unit, and what it keeps besides its rows: attention's output, and the sum of rows and
    update.

    Attributes:
        again: Whether it runs again, for its backward.
    """

    def __init__(self, level: str, host: HostMemory | None, number: int):
        self.keeps_attention, self.keeps_sum = level != "full", level == "selective"
        self.host, self.number = host, number
        self.attentions: list[list] = []
        self.sums: list = []
        self.again = False

    @property
    def update_unread(self) -> bool:
        """Whether it runs again and has kept the sum, so that nobody reads attention's update."""
        return self.again and bool(self.sums)

    def put(self, tensor: Tensor) -> Tensor | Stored:
        # With its place in the graph it would hold the graph that holds this unit.
        tensor = tensor.detach()
        return self.host.put(tensor, self.number) if self.host else tensor

    def get(self, stored: Any) -> Tensor:
        return self.host.get(stored) if self.host else stored


class _Running:
    """Context that tells a unit that it runs, or runs again; it may be entered many times."""

    def __init__(self, unit: Unit, again: bool):
        self.unit, self.again = unit, again

    def __enter__(self) -> None:
        self.unit.again = self.again
        self.mode = None
        if self.unit.keeps_attention:
            self.mode = (_ReuseAttention if self.again else _KeepAttention)(self.unit)
            self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.mode is not None:
            self.mode.__exit__(*error)


class _KeepAttention(TorchDispatchMode):
    """Keeps the results of attention operators."""

    def __init__(self, unit: Unit):
        super().__init__()
        self.unit = unit

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in _ATTENTION:
            kept = [self.unit.put(x) if torch.is_tensor(x) else x for x in out]
            self.unit.attentions.append(kept)
        return out


class _ReuseAttention(TorchDispatchMode):
    """Returns the kept results, in the same order, instead of running the operators again."""

    def __init__(self, unit: Unit):
        super().__init__()
        self.unit, self.kept = unit, iter(unit.attentions)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func._schema.name not in _ATTENTION:
            return func(*args, **(kwargs or {}))
        return tuple(self.unit.get(x) for x in next(self.kept))


def by_tiles(
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]], flat: Tensor, tile: int, which: int
) -> list[Tensor]:
    """Result number ``which`` of ``run`` on each tile of rows of ``flat [1, R, H]``."""
    made = (run(part)[which] for part in flat.split(tile, 1))
    return [x for x in made if x is not None]  # all of them


def _starts(count: int, tile: int) -> Sequence[int]:
    """Indices at which tiles begin."""
    return range(0, count, tile)


class _Rerun(Function):
    """Autograd function of `rerun_rows`."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        tile: int,
        behind: bool,
        rows: Tensor,
        update: Tensor | None,
        scale: float,
        unit: Unit | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        if unit is not None and unit.update_unread:
            total = unit.get(unit.sums[0])
        else:
            total = add_update(rows, update, scale)
            total = total.detach() if update is None else total.to(rows.dtype)
            if unit is not None and unit.keeps_sum and unit.attentions:
                unit.sums.append(unit.put(total))
        ctx.save_for_backward(total)
        ctx.run, ctx.tile, ctx.parameters = run, tile, parameters
        ctx.scale, ctx.update_dtype = scale, None if update is None else update.dtype
        kind = total.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.rng = _rng_state(total.device)
        if unit is not None and unit.again:
            # Nobody reads what a unit that runs again returns.
            out = total.new_empty(()).expand_as(total)
        else:
            flat = total.view(1, -1, total.shape[-1])
            tiles = by_tiles(run, flat, tile, 0 if behind else 1)
            out = tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)
            out = out.view_as(total)
        ctx.behind = behind
        return (out, None) if behind else (total, out)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor, grad_out: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (total,) = ctx.saved_tensors
        grad_rows = torch.empty_like(total)
        flat, out = (x.view(1, -1, total.shape[-1]) for x in (total, grad_rows))
        grads = [grad_total]
        if not ctx.behind:
            assert grad_out is not None  # autograd makes zeros of those that are missing
            grads.append(grad_out)
        grads = [x.reshape(1, -1, total.shape[-1]) for x in grads]
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        kind, dtype, enabled = ctx.autocast
        with _restored(ctx.rng, total.device), torch.autocast(kind, dtype=dtype, enabled=enabled):
            for start in _starts(flat.shape[1], ctx.tile):
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
                        before = sums[i]
                        sums[i] = grad if before is None else before.float().add_(grad)
                del outputs, found
        grad_update = None
        if ctx.update_dtype is not None:
            grad_update = grad_rows if ctx.scale == 1 else grad_rows * ctx.scale
            grad_update = grad_update.to(ctx.update_dtype)
        sums = [
            x if x is None else x.to(p.dtype) for x, p in zip(sums, ctx.parameters, strict=True)
        ]
        return None, None, None, grad_rows, grad_update, None, None, *sums


def rerun_rows(
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    modules: Sequence[nn.Module],
    rows: Tensor,
    update: Tensor | None,
    scale: float,
    width: int | None,
    behind: bool,
    unit: Unit | None,
) -> tuple[Tensor, Tensor | None]:
    """Call ``run`` on ``total = rows + scale * update``, and store only ``total``.

    Args:
        run: Function from rows ``[1, R, H]`` to the same rows and their update ``[1, R, H]``, which
            depends for each row on no other; or to new rows and None.
        modules: Modules that hold the parameters which ``run`` uses.
        rows: ``[B, K, H]``.
        update: Update of the rows, ``[B, K, H]``, or None for 0.
        scale: Factor of the update.
        width: Width of the widest activation inside, elements, which decides the size of a tile;
            None: one tile.
        behind: Whether ``run`` gives new rows and None (a norm stands after the addition).
        unit: Unit that this is a part of, or None.

    Returns:
        ``total`` and the update of each of its rows, both ``[B, K, H]``; or new rows and None.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    tile = tile_rows(rows, width)
    return _Rerun.apply(run, tile, behind, rows, update, scale, unit, *parameters)


def tile_rows(rows: Tensor, width: int | None) -> int:
    """Number of rows of a tile, of which gate, up, their product and two gradients take
    `TILE_BYTES`."""
    whole = rows.shape[0] * rows.shape[1]
    if width is None:
        return whole
    fitting = TILE_BYTES // (5 * width * rows.element_size())
    return min(whole, max(LEAST_ROWS, fitting // 256 * 256))


def _captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, in which nothing random is computed again."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None] | None:
    if _captured(device):
        return None
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


@contextmanager
def _restored(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """Within this context random numbers are as they were in the first run, so that dropout drops
    the same."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if state[1] is not None else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
