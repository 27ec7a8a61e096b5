"""The GPU that a plan is of: the one that was asked for, or the one here."""

from dataclasses import dataclass

import torch

from lemo_hf.kernels import launch
from lemo_hf.planning.speed import CARDS, OLD, OLD_CAPABILITY, Card, card_of
from lemo_hf.planning.trained import Trained


@dataclass(frozen=True)
class Gpu:
    """A GPU; without values one of which nothing is known.

    Attributes:
        title: What it is called in words, or None.
        capability: Major compute capability.
        triton: Whether it runs Triton's kernels.
        card: Its peaks, by which times are told, or None.
    """

    title: str | None = None
    capability: int = Trained.capability
    triton: bool = True
    card: Card | None = None


def gpu_here() -> Gpu:
    """The GPU of this machine, if it has one."""
    if not torch.cuda.is_available():
        return Gpu()
    name, triton = torch.cuda.get_device_name(), launch.settle("cuda") is None
    card = card_of(name) if triton else None
    title = name if card is None else card.title
    return Gpu(title, torch.cuda.get_device_capability()[0], triton, card)


def gpu_called(name: str) -> Gpu:
    """The GPU that ``--gpu`` asks for.

    Raises:
        ValueError: There is none of that name.
    """
    if name in OLD:
        return Gpu(OLD[name], OLD_CAPABILITY, triton=False)
    if name not in CARDS:
        raise ValueError(f"--gpu {name}: known are {', '.join((*CARDS, *OLD))}.")
    card = CARDS[name]
    return Gpu(card.title, card.capability, card=card)
