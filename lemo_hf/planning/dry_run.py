"""A training step without its arithmetic: sizes alone, and the most bytes that are alive at once.

Numbers are fake (`torch._subclasses.FakeTensorMode`): a tensor of floats has a shape and no
memory. Integers and masks are real, so that a batch, its positions and what layers keep of it are
those of a step. No kernel is launched; what is allocated around a launch is counted.

Layers that are alike need not all be there. What a missing one stores, and the gradients that it
leaves, are those of the layer before the gap.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from lemo_hf.altered import altering
from lemo_hf.core import whole_heads
from lemo_hf.kernels import launch, segment_cross_entropy
from lemo_hf.memory import offload, recompute
from lemo_hf.memory.recompute import by_tiles
from lemo_hf.planning import quantized
from lemo_hf.planning.work import ATTENTION, ATTENTION_BACKWARD, Ledger, Work, launching

ROUNDED = 512  # bytes: PyTorch's allocator hands out no less
INTEGERS = ("aten::arange", "aten::full", "aten::randint")  # are made if no dtype is given
MASK = "aten::ones"  # that of a row without padding, of floats in some models (OPT)
LOSS, STREAM, GRADIENTS, IN_FLIGHT = "loss", "stream", "gradients", "offload in flight"


class DryRun(FakeTensorMode):
    """See the module's docstring. A model's tensors become its own by ``to_empty`` within it.

    Args:
        triton: Whether the GPU runs Triton's kernels; see `Trained`.
    """

    def __init__(self, triton: bool = True) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._triton = triton
        self._deep = self._counts = False
        self._named: str | None = None

    @contextmanager
    def counted(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        gaps: dict[int, int],
        stores: Sequence[tuple[str, str, str]],
    ) -> Iterator[None]:
        """Count what is allocated within: one forward and one backward.

        Args:
            model: Its tensors are there already, and not counted.
            layers: Its decoder layers.
            gaps: How many layers are missing before a layer, by its index. The two layers before
                the gap and the one behind it are like them.
            stores: Parts that each layer stores: by its attention, of attention's output, behind.
        """
        self._gaps, self._stores, self.layer = gaps, stores, -1
        self._ledger = Ledger()
        tensors = (*model.parameters(), *model.buffers())
        self._blocks = {x.untyped_storage()._cdata: [0, ""] for x in tensors}  # bytes and part
        self._now = self._out = self._back = 0
        self._before: list[Counter[str]] = []  # by layer: bytes alive when its forward began
        self._entered: dict[int, int] = {}  # by layer: when its backward began
        self._lowest, self._behind = len(layers), False
        self._stream = [0, STREAM]
        # Highest moments, by phase and gaps passed on the way forward and back.
        self._moments: dict[tuple[str, int, int], tuple[int, list[list]]] = {}
        with ExitStack() as stack:
            for layer in layers:
                hook = layer.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(layers[-1].register_forward_hook(self._leave).remove)
            if gc.isenabled():
                stack.callback(gc.enable)
                gc.disable()  # what only it would free is freed at no fixed time
            stack.callback(setattr, self, "_counts", False)
            stack.enter_context(self._as_on_a_gpu())
            stack.enter_context(self)
            self._counts = True
            yield
            for weight in model.parameters():
                if weight.grad is not None:
                    self._blocks[weight.grad.untyped_storage()._cdata][1] = GRADIENTS

    @contextmanager
    def named(self, part: str) -> Iterator[None]:
        """What is allocated within is ``part``."""
        self._named = part
        try:
            yield
        finally:
            self._named = None

    def phases(self) -> dict[str, Counter[str]]:
        """Bytes by part at the highest moment of each phase, the missing layers' among them."""
        stored, left = [], []
        for behind, count in self._gaps.items():
            more = self._before[behind].copy()
            more.subtract(self._before[behind - 1])
            each = more.total() + self._entered[behind - 2] - self._entered[behind - 1]
            stored.append(Counter({part: count * size for part, size in more.items()}))
            left.append(Counter({GRADIENTS: count * each}))
        highest: dict[str, Counter[str]] = {}
        for (phase, out, back), (_, moment) in self._moments.items():
            parts = _by_part(moment)
            for missing in (*stored[: out - back], *left[out - back : out]):
                parts.update(missing)
            if phase not in highest or parts.total() > highest[phase].total():
                highest[phase] = parts
        return highest

    def work(self, **more: float) -> Work:
        """What was done within, by the missing layers as well, and ``more``."""
        return self._ledger.total(self._gaps, **more)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for all the time
        if func is torch.ops.aten.rand.default and not args[0]:
            return torch.ones(())  # layerdrop's, on the host: chance may leave no layer out
        if self._deep:  # what PyTorch does to find out a shape
            return super().__torch_dispatch__(func, types, args, kwargs)
        out: Any
        name = func._schema.name
        if FakeTensor not in types and _is_real(name, args, kwargs):
            out = func(*args, **kwargs)
        elif func is torch.ops.aten.addmm.dtype_out:  # PyTorch 2.11 fails to find out its shape
            out = kwargs["out"]
        else:
            self._deep = True
            try:
                out = super().__torch_dispatch__(func, types, args, kwargs)
                if name == ATTENTION and not self._triton:
                    out = _by_token(out[0]), *out[1:]
            finally:
                self._deep = False
        if self._counts:
            self._see(name, args, out)
            self._ledger.see(self._place, func, args, kwargs, out)
        return out

    def _see(self, name: str, args: tuple, out: Any) -> None:
        """Count what an operator has made, and what it took inside."""
        inside, part = quantized.inside(name, args, out), "a dequantised weight"
        if name == ATTENTION_BACKWARD:
            self._behind, inside, part = True, _flash_buffers(*args[1:3]), "backward"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, name)
        if name == "aten::bernoulli_":  # dropout's mask, which on a GPU is of bytes
            block = self._blocks[args[0].untyped_storage()._cdata]
            self._now += args[0].numel() - block[0]
            block[0] = args[0].numel()
        if inside:
            self._note(inside, part)
        self._behind |= name == ATTENTION and not _in_backward()

    def _add(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        size = -(-storage.nbytes() // ROUNDED) * ROUNDED
        self._blocks[key] = [size, self._part(tensor, name, size)]
        self._now += size
        weakref.finalize(storage, self._drop, key, self._blocks).atexit = False
        self._note()

    def _drop(self, key: int, blocks: dict[int, list]) -> None:
        size, _ = blocks.pop(key)
        if blocks is self._blocks:
            self._now -= size

    def _note(self, beside: int = 0, part: str = "") -> None:
        """Keep this moment if it is the highest of its phase."""
        key, size = (self._phase, self._out, self._back), self._now + beside
        if key not in self._moments or size > self._moments[key][0]:
            self._moments[key] = size, [*self._blocks.values(), [beside, part]]

    def _part(self, tensor: Tensor, name: str, size: int) -> str:
        if self._named is not None:
            return self._named
        if not tensor.is_floating_point() or self.layer < 0:
            return "ids, positions, kept sets"
        if _in_backward() and self._lowest < len(self._stores):
            return "recomputed layer" if torch.is_grad_enabled() else "backward"
        if self.layer == len(self._stores):
            return "stream gradient" if size == self._stream[0] else LOSS
        return self._stores[self.layer][1 if name == ATTENTION else 2 * self._behind]

    @property
    def _place(self) -> tuple[int, bool]:
        """The layer that is at work, and whether it is its backward."""
        back = _in_backward()
        return (self._lowest if back else self.layer), back

    @property
    def _phase(self) -> str:
        if not _in_backward():
            return "forward" if self.layer < len(self._stores) else LOSS
        if self._lowest < 0:
            return "backward of the embeddings"
        if self._lowest == len(self._stores):
            return "backward of the loss"
        return f"backward of an {'attention' if self._behind else 'MLP'}"

    def _enter(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A layer's forward begins."""
        if _in_backward():
            return  # it is computed again
        stream = args[0] if args else kwargs["hidden_states"]
        now = self._blocks[stream.untyped_storage()._cdata]
        if now is not self._stream:
            if self.layer >= 0:
                self._stream[1] = self._stores[self.layer][0]
            now[1], self._stream = STREAM, now
        self._out += self.layer + 1 in self._gaps
        self._begin(stream)

    def _leave(self, _: nn.Module, args: tuple, out: Any) -> None:
        """The last layer's forward is over."""
        if not _in_backward():
            self._begin(out if isinstance(out, Tensor) else out[0])

    def _begin(self, stream: Tensor) -> None:
        self.layer += 1
        self._before.append(_by_part(self._blocks.values()))
        self._behind = False
        if stream.requires_grad:
            layer = self.layer - 1
            stream.register_hook(lambda _: self._go_back(layer))
        self._note()

    def _go_back(self, layer: int) -> None:
        """The backward of ``layer`` begins."""
        self._lowest, self._entered[layer], self._behind = layer, self._now, False
        self._back += layer + 1 in self._gaps
        self._note()

    @contextmanager
    def _as_on_a_gpu(self) -> Iterator[None]:
        """Within it fake tensors go the ways of a GPU's; launches and copies do nothing."""

        def nothing(*_: Any, **__: Any) -> None:
            return None

        launched, ledger = KernelInterface.__getitem__, self._ledger
        gpus, plain = {"cpu"} if self._triton else set(), launch.PLAIN | {FakeTensor}
        try:
            KernelInterface.__getitem__ = launching(lambda args: ledger.launch(self._place, args))
            with (
                altering(launch, DEVICES=gpus, WIDENING=gpus, PLAIN=plain),
                altering(whole_heads, are_needed=self._needs_whole_heads),
                sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),  # whatever is set
                altering(offload, _copy=nothing),
                # From the second on they take as much memory.
                altering(segment_cross_entropy, _starts=ledger.starts),
                altering(recompute, _starts=ledger.starts, by_tiles=self._some_tiles),
            ):
                yield
        finally:
            KernelInterface.__getitem__ = launched

    def _needs_whole_heads(self, attention: nn.Module, _: torch.device) -> bool:
        """What `whole_heads.are_needed` says on the GPU."""
        return not self._triton and whole_heads.share_keys(attention)

    def _some_tiles(self, run: Callable, flat: Tensor, tile: int, which: int) -> list[Tensor]:
        """`by_tiles`, of which those between the first and the last take what their results do."""
        count = flat.shape[1]
        last = (count - tile) // tile * tile
        if last <= 2 * tile:
            return by_tiles(run, flat, tile, which)
        first = by_tiles(run, flat[:, :tile], tile, which)
        with self._ledger.repeated(last / tile - 1):
            first += by_tiles(run, flat[:, tile : 2 * tile], tile, which)
        between = first[0].new_empty(1, last - 2 * tile, first[0].shape[2])
        return [*first, between, *by_tiles(run, flat[:, last:], tile, which)]


def _by_part(blocks: Iterable[list]) -> Counter[str]:
    parts: Counter[str] = Counter()
    for size, part in blocks:
        parts[part] += size
    return parts


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _by_token(x: Tensor) -> Tensor:
    """Attention's output ``[B, heads, n, D]`` as the kernel of a GPU without Triton lays it out,
    whatever the layout of the queries: token by token."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _is_real(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an operator has numbers to work on: integers, and what is made of them."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if tensors:
        return not any(isinstance(x, FakeTensor) or x.is_meta for x in tensors)
    if name == MASK:
        return True
    dtype = kwargs.get("dtype")
    return name in INTEGERS if dtype is None else not dtype.is_floating_point


def _flash_buffers(query: Tensor, key: Tensor) -> int:
    """Bytes that a GPU's attention takes in its backward, and a CPU's does not.

    The fp32 sum of the queries' gradient, whose heads FlashAttention widens to a multiple of 32,
    and those of keys and values by query head where heads share keys.
    """
    heads, size = query.numel() // query.shape[-1], query.shape[-1]
    shared = key.shape[1] < query.shape[1]
    return heads * 4 * (-(-size // 32) * 32) + (2 * query.nbytes if shared else 0)
