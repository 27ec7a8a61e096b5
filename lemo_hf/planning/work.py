"""What a step does, by which its time is told: operations, bytes that are moved, launches.

Operators are seen as `lemo_hf.planning.dry_run` runs them. Recomputation is among them, as it is in
the step. What repeats is run once and counted as often as it repeats.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Of fake tensors; a GPU has others, which do the same.
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
ATTENTION_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")}
EIGHT_BITS = "aten::_scaled_mm"
GROUPED = "aten::_grouped_mm"
# What reads a part of its first operand, about as much as it returns.
GATHERS = {f"aten::{name}" for name in ("embedding", "index_select", "index", "gather")}


@dataclass(frozen=True)
class Work:
    """Work of one forward and backward pass and the optimizer's step.

    Attributes:
        products: Operations of matrix products in 16 bits or more.
        eight_bits: Operations of matrix products in FP8.
        attention: Operations of attention; of causal attention half of the square.
        moved: Bytes that all other operators read and write.
        launches: Number of kernels that the host launches.
        offloaded: Bytes that leave for the host and come back.
    """

    products: float = 0
    eight_bits: float = 0
    attention: float = 0
    moved: float = 0
    launches: float = 0
    offloaded: float = 0

    @property
    def flops(self) -> float:
        """All operations of products and attention."""
        return self.products + self.eight_bits + self.attention


class Ledger:
    """Counts the work of a dry run, by place: a layer's index, and whether it is its backward."""

    def __init__(self) -> None:
        self._by_place: defaultdict[tuple[int, bool], dict[str, float]] = defaultdict(
            lambda: defaultdict(float)
        )
        self._times = 1.0

    def see(self, place: tuple[int, bool], func: Any, args: tuple, kwargs: Any, out: Any) -> None:
        """Count what an operator has done."""
        name = func._schema.name
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not outputs or "empty" in name or not _works(func):
            return
        found = self._by_place[place]
        found["launches"] += self._times
        kind, operations = _operations(name, func, args, kwargs, outputs)
        if kind is not None:
            found[kind] += self._times * operations
        else:
            found["moved"] += self._times * _moved(name, args, kwargs, outputs)

    def launch(self, place: tuple[int, bool], args: Iterable[Any]) -> None:
        """Count a kernel of LeMo's, which reads or writes each of its tensors."""
        tensors = {id(x): x.nbytes for x in args if isinstance(x, Tensor)}
        self._by_place[place]["launches"] += self._times
        self._by_place[place]["moved"] += self._times * sum(tensors.values())

    @contextmanager
    def repeated(self, times: float) -> Iterator[None]:
        """What is done within is done so many times."""
        before, self._times = self._times, self._times * times
        try:
            yield
        finally:
            self._times = before

    def starts(self, count: int, size: int) -> Iterator[int]:
        """Where the first three of equal parts begin, the third of which stands for all others."""
        starts = range(0, count, size)
        yield from starts[:2]
        for start in starts[2:3]:
            with self.repeated((count - start) / min(size, count - start)):
                yield start

    def total(self, gaps: dict[int, int], **more: float) -> Work:
        """All of it, and ``more``; ``gaps``: how many layers are missing before a layer, which are
        like that before."""
        times = {behind - 1: 1 + count for behind, count in gaps.items()}
        found: defaultdict[str, float] = defaultdict(float, more)
        for (layer, _), work in self._by_place.items():
            for kind, amount in work.items():
                found[kind] += times.get(layer, 1) * amount
        return Work(**found)


def _works(func: Any) -> bool:
    """Whether an operator launches anything: views do not."""
    return not func.is_view and func._schema.name not in ("aten::_unsafe_view", "aten::lift_fresh")


def _operations(
    name: str, func: Any, args: tuple, kwargs: dict[str, Any], outputs: list[Tensor]
) -> tuple[str | None, float]:
    """Which kind of products an operator is, and its operations."""
    if name in PRODUCTS or name == EIGHT_BITS:
        packet = torch.ops.aten.addmm if name == "aten::addmm_" else func.overloadpacket
        tensors = [x for x in args if isinstance(x, Tensor)]
        operations = flop_registry[packet](*tensors, out_val=outputs[0])
        return ("eight_bits" if name == EIGHT_BITS else "products"), operations
    if name in (ATTENTION, ATTENTION_BACKWARD):
        backward = name == ATTENTION_BACKWARD
        shapes = [x.shape for x in args[backward : backward + 3]]
        shapes[1:] = [(*x[:1], shapes[0][1], *x[2:]) for x in shapes[1:]]  # heads share keys
        if backward:
            whole = sdpa_backward_flop_count(shapes[0], *shapes)
        else:
            whole = sdpa_flop_count(*shapes)
        causal = _argument(func, args, kwargs, "is_causal")
        return "attention", whole / (2 if causal else 1)
    if name == GROUPED:
        return "products", 2 * prod(args[0].shape) * outputs[0].shape[-1]
    if name == "bitsandbytes::gemm_4bit":
        return "products", 2 * args[0].numel() // args[0].shape[-1] * prod(args[2])
    if name == "bitsandbytes::int8_scaled_mm":
        return "products", 2 * prod(args[0].shape) * outputs[0].shape[-1]
    return None, 0


def _moved(name: str, args: tuple, kwargs: dict[str, Any], outputs: list[Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    written = sum(x.nbytes for x in outputs)
    if name in GATHERS:
        return 2 * written
    return written + sum(x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _argument(func: Any, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    if name in kwargs:
        return kwargs[name]
    place = next(i for i, x in enumerate(func._schema.arguments) if x.name == name)
    return args[place] if place < len(args) else func._schema.arguments[place].default_value


def launching(launch: Callable[[tuple], None]) -> Callable[..., Callable[..., None]]:
    """In place of ``__getitem__`` of a kernel: what is launched is told to ``launch``."""
    return lambda *_: lambda *args, **kwargs: launch((*args, *kwargs.values()))
