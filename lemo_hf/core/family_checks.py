"""Checks of a config against the layers of a family."""

from typing import Any

from lemo_hf.config import LeMoConfig
from lemo_hf.core.family import Family


def check_family(config: LeMoConfig, family: Family, model_type: str) -> None:
    """Raises ValueError if layers of the family do not support ``config`` or its policy."""
    if family.own_attention and config.policy in ("oracle", "pooled"):
        raise ValueError(
            f"policy={config.policy!r}: transformers' attention of {model_type!r} does not give "
            "out its queries and keys, so they cannot be compared. Use policy='auto'."
        )
    if family.recurrent is not None and config.policy in ("oracle", "pooled"):
        raise ValueError(
            f"policy={config.policy!r}: some layers of {model_type!r} pass a state from token to "
            "token and have no queries and keys to compare. Use policy='auto'."
        )
    if family.layer_scale is not None:
        _check_one_set(config, model_type)
    for name in ("mlp_retention", "mlp_threshold"):
        if family.parallel and getattr(config, name) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)}: attention and MLP of {model_type!r} read the "
                f"same rows at the same time, so they must keep the same blocks. Set {name}=None."
            )


def _check_one_set(config: LeMoConfig, model_type: str) -> None:
    """Raises ValueError unless all layers from some layer on keep the same tokens.

    Layers scale the stream and read each other's keys, so a token that was left out once must stay
    out.
    """
    for name, value, needed in (
        ("agree_across_layers", config.agree_across_layers, True),
        ("dense_last_layers", config.dense_last_layers, 0),
        ("mlp_retention", config.mlp_retention, None),
        ("mlp_threshold", config.mlp_threshold, None),
    ):
        if value != needed:
            raise ValueError(
                f"{name}={value}: layers of {model_type!r} scale the stream and read keys and "
                f"values of earlier layers, so all must keep the same tokens. Set {name}={needed}."
            )
    if isinstance(config.retention, tuple | list) or isinstance(config.threshold, tuple | list):
        raise ValueError(
            f"retention and threshold by layer: layers of {model_type!r} scale the stream and read "
            "keys and values of earlier layers, so all must keep the same tokens. Give one "
            "number, and dense_first_layers for layers that keep everything."
        )


def check_shared_keys(config: LeMoConfig, model_config: Any) -> None:
    """Raises ValueError for layers that keep everything and give keys to layers that do not."""
    first = model_config.num_hidden_layers - model_config.num_kv_shared_layers
    before = model_config.layer_types[:first]
    givers = [first - 1 - before[::-1].index(kind) for kind in set(before)]
    if config.dense_first_layers > min(givers):
        raise ValueError(
            f"dense_first_layers={config.dense_first_layers}: layer {min(givers)} gives its keys "
            f"and values to layers from {first} on, so they must keep the same tokens. Set "
            f"dense_first_layers to {min(givers)} or less."
        )
