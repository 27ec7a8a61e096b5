"""How long a step takes on a card: what it does, by the card's peaks and shares of them.

Products, attention and everything else follow each other on the GPU. The host launches meanwhile,
and where it takes longer than the GPU, a step takes as long as the host.
"""

from dataclasses import dataclass
from statistics import mean

from lemo_hf.config import UNITS
from lemo_hf.planning.plan import Plan

FITTED_ON = "h200"
# Fitted to the steps that were measured on an H200 by `benchmarks/plan_speed.py`: shares of a
# card's peaks, and microseconds of the host for each kernel that is launched.
SHARES = {"products": 0.626, "eight_bits": 0.601, "attention": 0.554, "moved": 0.687}
PEAKS = {kind: kind for kind in SHARES} | {"attention": "products"}
HOST = {"stock": 26.5, "fused": 49.2, "LeMo": 72.6, "recomputed layers": 120.8}


@dataclass(frozen=True)
class Card:
    """A GPU. Peaks are those of NVIDIA's data sheets, of products without sparsity.

    Attributes:
        title: What it is called in words.
        devices: What CUDA calls it.
        capability: Major compute capability.
        products: Operations a second, in bf16.
        eight_bits: In FP8; 0 if it has none.
        moved: Bytes a second of its memory.
        offloaded: Bytes a second over PCIe, in one direction.
    """

    title: str
    devices: tuple[str, ...]
    capability: int
    products: float
    eight_bits: float
    moved: float
    offloaded: float

    @property
    def said(self) -> str:
        """In a sentence, how far a time on it is to be believed."""
        fitted = CARDS[FITTED_ON]
        if self == fitted:
            return f"Times are of an {self.title}, fitted to steps that were measured on it."
        return (
            f"Times are of an {self.title} by its data sheet, with the shares of its peaks that an "
            f"{fitted.title} reaches: no step was measured on it."
        )


CARDS = {
    "h200": Card("NVIDIA H200", ("NVIDIA H200",), 9, 989.5e12, 1979e12, 4.8e12, 64e9),
    "h100": Card(
        "NVIDIA H100 SXM", ("NVIDIA H100 80GB HBM3",), 9, 989.5e12, 1979e12, 3.35e12, 64e9
    ),
    "a100": Card("NVIDIA A100 SXM 80 GB", ("NVIDIA A100-SXM4-80GB",), 8, 312e12, 0, 2.039e12, 32e9),
    "l40s": Card("NVIDIA L40S", ("NVIDIA L40S",), 8, 362.05e12, 733e12, 0.864e12, 32e9),
}


# Those that Triton makes no code for, by what they are called in words. No times are told of them.
OLD = {"v100": "NVIDIA V100", "t4": "NVIDIA T4"}
OLD_CAPABILITY = 7


def card_of(device: str) -> Card | None:
    """The card that CUDA calls ``device``, or None if it is none of `CARDS`."""
    return next((card for card in CARDS.values() if device in card.devices), None)


def step_seconds(plan: Plan, card: Card) -> float:
    """Seconds of the optimizer step that ``plan`` describes, on ``card``.

    Raises:
        ValueError: The card has no FP8.
    """
    if plan.work.eight_bits and not card.eight_bits:
        raise ValueError(f"fp8=True: an {card.title} has no products in FP8.")
    gpu = sum(seconds / SHARES[kind] for kind, seconds in at_peak(plan, card).items())
    host = plan.work.launches * 1e-6 * mean(HOST[kind] for kind in host_kinds(plan))
    return max(gpu, host, 2 * plan.work.offloaded / card.offloaded)


def at_peak(plan: Plan, card: Card) -> dict[str, float]:
    """Seconds that a GPU at its peaks takes, by what it does."""
    amounts = {kind: getattr(plan.work, kind) for kind in SHARES}
    peaks = {kind: getattr(card, PEAKS[kind]) for kind in SHARES}
    return {kind: amount / peaks[kind] for kind, amount in amounts.items() if amount}


def host_kinds(plan: Plan) -> list[str]:
    """What the host does for each layer, as `HOST` has it."""
    found = ["recomputed layers" if level in UNITS else "LeMo" for level in plan.levels]
    return found or ["fused" if plan.fused else "stock"]
