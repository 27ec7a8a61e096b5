"""Checks of a `LeMoConfig`; an error names the field and the value."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

import numpy as np

from lemo_hf.shown import nearest, shown

POLICIES = (
    *("auto", "overlap", "chunks", "recent", "window"),
    *("random", "pooled", "oracle", "predictor"),
)
SUPERVISE = ("kept", "all")
LEVELS = ("none", "mlp", "selective", "lean", "full")  # of recomputation
UNITS = ("selective", "lean", "full")  # at which a layer is run again as a whole
# Fields that say how much is kept, and the value at which that is everything.
KEEPS_ALL = {"retention": 1, "threshold": 0, "mlp_retention": 1, "mlp_threshold": 0}
LARGEST = 2**63 - 1  # integer that tensors know

_LEAST = {
    "block_size": 1,
    "chunk_size": 1,
    "segment_size": 1,
    "dense_first_layers": 0,
    "dense_last_layers": 0,
    "sequence_parallel_size": 1,
}
_CHOICES = {
    "policy": POLICIES,
    "supervise": SUPERVISE,
    "agree_across_layers": (True, False),
    "cuda_graphs": (True, False),
    "fp8": (True, False),
}
_SHARES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "dense_finish": ("[0, 1], or be None", lambda x: 0 <= x <= 1),
    "finish_retention": ("(0, 1]", lambda x: 0 < x <= 1),
    "bf16_finish": ("[0, 1]", lambda x: 0 <= x <= 1),
    "random_share": ("[0, 1), or be None", lambda x: 0 <= x < 1),
}


def knows_its_fields(config_class: type) -> type:
    """The dataclass, which answers an unknown argument with the name that may have been meant, and
    takes NumPy's numbers for Python's."""
    made, known = vars(config_class)["__init__"], [field.name for field in fields(config_class)]

    @wraps(made)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{config_class.__name__} has no {name!r}{nearest(name, known)}")
        made(self, *map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()})

    config_class.__init__ = checked  # type: ignore[misc]
    return config_class


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def check_values(config: Any) -> None:
    """Raises ValueError unless the fields of the `LeMoConfig` are in range and go together."""
    _check_how_much(config)
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is None and name == "segment_size":
            continue
        if type(value) is not int or not least <= value <= LARGEST:
            raise ValueError(
                f"{name} must be an integer of at least {least}, got {shown(value)}{_meant(value)}"
            )
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices or type(value) is not type(choices[0]):  # 1 == True
            raise ValueError(
                f"{name} must be one of {choices}, got {shown(value)}{nearest(value, choices)}"
            )
    _check_schedule(config)
    _check_memory(config)
    if config.cuda_graphs:
        _check_graphs(config)
    if type(config.seed) is not int or abs(config.seed) > LARGEST:
        raise ValueError(
            f"seed must be an integer of at most {LARGEST:,} either way, got {shown(config.seed)}"
            f"{_meant(config.seed)}"
        )


def _check_how_much(config: Any) -> None:
    for name in KEEPS_ALL:
        value, share = getattr(config, name), name.endswith("retention")
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if not (_is_number(number) and (0 < number <= 1 if share else number >= 0)):
                raise ValueError(
                    f"{name} must lie in {'(0, 1]' if share else '[0, inf)'}, got "
                    f"{shown(number)} in {name}={shown(value)}{_meant(number, share)}"
                )
    for one, other in (("retention", "threshold"), ("mlp_retention", "mlp_threshold")):
        values = getattr(config, one), getattr(config, other)
        if None not in values:
            raise ValueError(
                f"{one}={shown(values[0])} and {other}={shown(values[1])} both say how much is "
                "kept: set one of them to None."
            )


def _check_schedule(config: Any) -> None:
    for name, (interval, inside) in _SHARES.items():
        value = getattr(config, name)
        if value is None and name not in ("finish_retention", "bf16_finish"):
            continue
        if not (_is_number(value) and inside(value)):
            raise ValueError(
                f"{name} must lie in {interval}, got {shown(value)}{_meant(value, share=True)}"
            )
    share, kept = config.finish_retention, config.retention
    least = min(kept) if isinstance(kept, tuple) else kept
    if config.finish and least is not None and share < least:
        raise ValueError(
            f"finish_retention={share:g} keeps less than retention={shown(kept)} of the steps "
            "before the finish, which it is to repair: give at least as much, or leave it out."
        )
    if config.random_share and config.policy not in ("auto", "overlap", "predictor"):
        raise ValueError(
            f"random_share={config.random_share} and policy={config.policy!r}: only 'overlap', "
            "'predictor' and 'auto' leave a share of the blocks to chance. Set random_share=0."
        )
    for name in ("threshold", "mlp_threshold"):
        value = getattr(config, name)
        if value is not None and (config.random_share or config.policy == "auto"):
            raise ValueError(
                f"{name}={shown(value)} compares scores, and policy={config.policy!r} with "
                f"random_share={config.random_share} only ranks blocks: use policy='overlap', "
                "'pooled' or 'predictor' without a random_share, or a retention."
            )


def _check_memory(config: Any) -> None:
    value = config.recompute
    for level in value if isinstance(value, tuple) else () if value is None else (value,):
        if level not in LEVELS:
            raise ValueError(
                f"recompute must be one of {LEVELS} (or one a layer), or None, got {shown(level)}"
                f"{nearest(level, LEVELS)}"
            )
    budget = config.offload_gib
    if budget is not None and not (_is_number(budget) and budget > 0):
        raise ValueError(
            f"offload_gib must be a number above 0 or None, got {shown(budget)}{_meant(budget)}"
        )
    levels = value if isinstance(value, tuple) else (value,)
    if budget is not None and not {None, *UNITS} & {*levels}:
        raise ValueError(
            f"offload_gib={budget:g} and recompute={value!r}: only what {', '.join(UNITS)} store "
            "waits in host memory. Set recompute to one of them or to None, or offload_gib=None."
        )


def _check_graphs(config: Any) -> None:
    for name, allowed in (
        ("threshold", None),
        ("mlp_threshold", None),
        ("offload_gib", None),
        ("sequence_parallel_size", 1),
    ):
        value = getattr(config, name)
        if value != allowed:
            raise ValueError(
                f"cuda_graphs=True and {name}={value!r} cannot be combined: with {name} the host "
                "must act in the middle of a pass, which a graph does not allow. Set "
                f"cuda_graphs=False, or {name}={allowed}."
            )
    one_set = config.agree_across_layers and config.mlp_retention is None
    if not one_set and config.supervise == "kept":
        raise ValueError(
            "cuda_graphs=True and supervise='kept' need one kept set: with "
            f"agree_across_layers={config.agree_across_layers} and "
            f"mlp_retention={config.mlp_retention} only the end of a pass shows how many tokens "
            "have a loss. Set cuda_graphs=False, or supervise='all'."
        )


def _meant(value: Any, share: bool = False) -> str:
    """The end of a sentence on a wrong number: the one in quotes, or the one in per cent."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value.rstrip("%"))
        except ValueError:
            return "."
    if not _is_number(number):
        return "."
    if share and 1 < number <= 100:
        number /= 100
    return "." if number == value else f": did you mean {number:g}?"


def _is_number(value: Any) -> bool:
    small = type(value) is not int or abs(value) <= LARGEST  # a larger one may be no float
    return small and type(value) in (int, float) and math.isfinite(value)
