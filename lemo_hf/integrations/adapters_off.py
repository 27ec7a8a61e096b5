"""A PEFT model without its adapters for a while, by their switches alone.

PEFT's own `disable_adapter` looks through the whole model several times and freezes each adapter,
which takes the host a fifth of a DPO step of a small model (docs/LOG.md). A pass without gradient
needs no frozen adapters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from lemo_hf.altered import altering


def switches_of(model: nn.Module) -> list[Any]:
    """Modules that have adapters, or that PEFT trains beside them."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def quickly_disabled(model: Any, switches: Sequence[Any]) -> Iterator[None]:
    """Within this context ``model.disable_adapter()`` does what a pass without gradient needs, to
    ``switches``."""
    if not switches:
        yield
        return
    with altering(model, disable_adapter=partial(_off, model, switches)):
        yield


@contextmanager
def _off(model: Any, switches: Sequence[Any]) -> Iterator[None]:
    before = [switch._disable_adapters for switch in switches]
    disabled = model._adapters_disabled
    try:
        for switch in switches:
            switch._disable_adapters = True
        model._adapters_disabled = True
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch._disable_adapters = was
        model._adapters_disabled = disabled
