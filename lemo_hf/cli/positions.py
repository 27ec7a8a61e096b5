"""Rotary positions of a model's config, changed as options ask."""

import logging
import math
from typing import Any

from lemo_hf.shown import nearest

logger = logging.getLogger(__name__)

ORIGINAL = "original_max_position_embeddings"
# By type: what it needs beside rope_theta, and what else it reads.
READ = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", ORIGINAL), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "proportional": ((), ("factor", "partial_rotary_factor")),
}
# Models whose positions are a table.
TABLES = ("opt", "gpt2", "gpt_bigcode", "gptj", "codegen")
# They follow from a length.
STRETCHED = ("linear", "yarn", "dynamic")
_SCALING = {name for needed, more in READ.values() for name in (*needed, *more)}
_SCALING -= {"partial_rotary_factor"}
_LISTS = ("short_factor", "long_factor")
_RISING = (("beta_slow", "beta_fast", 1, 32), ("low_freq_factor", "high_freq_factor", 1, 4))


def change_positions(
    config: Any,
    *,
    rope_type: str | None,
    rope_parameters: dict[str, Any] | None,
    max_position_embeddings: int | None,
    length: int | None,
) -> None:
    """Change a config's positions as the arguments of `prepared_config` ask.

    Raises:
        ValueError: The model has no such positions, or it would run or load with other positions
            than those asked for.
    """
    if rope_type is None and rope_parameters is None and max_position_embeddings is None:
        return
    text = config.get_text_config()
    own = getattr(text, "rope_parameters", None)
    if not own:
        raise ValueError(
            f"{text.model_type!r} has no rotary positions to change: leave out --rope-type, "
            "--rope-parameters and --max-position-embeddings."
        )
    given, most = dict(rope_parameters or {}), text.max_position_embeddings
    nested = all(value is None or isinstance(value, dict) for value in own.values())
    if rope_type is not None:
        _check_stretched(text, own, nested, rope_type, length, max_position_embeddings)
        given = _stretched(text, rope_type, length or 0, given)
    if nested:
        if not given.keys() <= own.keys() or not all(isinstance(x, dict) for x in given.values()):
            raise ValueError(
                f"--rope-parameters {given}: {text.model_type!r} has one set of parameters for "
                f"each of {', '.join(sorted(own))}: name the ones you mean, as in "
                f'{{"{min(own)}": {{"rope_type": "linear", "factor": 4.0}}}}.'
            )
        changed = {kind: _merged(text, own[kind] or {}, new) for kind, new in given.items()}
        text.rope_parameters = {**own, **changed}
    elif given:
        text.rope_parameters = _merged(text, own, given)
        if ORIGINAL in text.rope_parameters and hasattr(text, ORIGINAL):
            setattr(text, ORIGINAL, text.rope_parameters[ORIGINAL])  # Phi's, which comes first
    if max_position_embeddings is not None:
        if max_position_embeddings < 1:
            raise ValueError(
                f"--max-position-embeddings must be at least 1, got {max_position_embeddings}."
            )
        text.max_position_embeddings = max_position_embeddings
    elif rope_type in ("linear", "yarn"):
        # Dynamic scaling begins behind this many: the model's own.
        text.max_position_embeddings = max(most, length or 0)
    elif not nested and "factor" in given:
        text.max_position_embeddings = max(most, _reach(text.rope_parameters, own, most))
    _check_saved(config)


def _reach(changed: dict[str, Any], own: dict[str, Any], most: int) -> int:
    """Positions that a factor makes of the original ones; 0 if these are not known, or if the type
    needs their number to stay."""
    if changed["rope_type"] not in ("linear", "yarn", "llama3"):
        return 0
    fresh = own.get("rope_type", "default") in ("default", "dynamic")
    return int((changed.get(ORIGINAL) or (most if fresh else 0)) * changed["factor"])


def check_length(config: Any, length: int | None) -> None:
    """Warn of rows that are longer than the positions that a model was made for.

    Raises:
        ValueError: It has a table of positions, which ends there.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    rotary = getattr(text, "rope_parameters", None) or {}
    if length is None or not most or length <= most or getattr(text, "alibi", False):
        return
    said = f"rows of {length:,} tokens are longer than the {most:,} positions of the model"
    if text.model_type in TABLES:
        raise ValueError(f"{said} ({text.model_type}), and it has no more: ask for shorter rows.")
    if rotary.get("rope_type") != "dynamic":  # which stretches them by itself
        logger.warning(
            "%s, which has learned none behind them: give a rope_type, such as yarn.", said
        )


def _check_stretched(
    text: Any,
    own: dict[str, Any],
    nested: bool,
    rope_type: str,
    length: int | None,
    most: int | None,
) -> None:
    if rope_type not in STRETCHED:
        raise ValueError(
            f"--rope-type must be linear, yarn or dynamic, got {rope_type!r}: other types need "
            "more than a length: give --rope-parameters."
        )
    if length is None:
        raise ValueError(
            f"--rope-type {rope_type} stretches positions to a length, and this command knows "
            "none: give --rope-parameters."
        )
    if nested:
        raise ValueError(
            f"--rope-type {rope_type}: {text.model_type!r} has no single set of rotary "
            "parameters to stretch: give --rope-parameters."
        )
    if own.get("rope_type", "default") != "default":
        raise ValueError(
            f"--rope-type {rope_type}: the model's positions are stretched already ({own}): give "
            "--rope-parameters to replace them."
        )
    if rope_type == "dynamic" and most is not None:
        raise ValueError(
            "--rope-type dynamic begins after the model's max_position_embeddings, "
            f"{text.max_position_embeddings}: leave out --max-position-embeddings."
        )


def _stretched(text: Any, rope_type: str, length: int, given: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters that stretch the model's positions to ``length`` tokens, with those ``given``
    over them."""
    wanted = _with_type(given).get("rope_type", rope_type)
    if wanted != rope_type:
        raise ValueError(
            f"--rope-type {rope_type} and --rope-parameters of type {wanted!r} contradict each "
            "other: give one of them."
        )
    if length <= text.max_position_embeddings:
        return given
    factor = length / text.max_position_embeddings
    return {"rope_type": rope_type, "factor": factor, **given}


def _with_type(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters with their type as ``rope_type``, transformers' name for it; many models were
    published with ``type``.

    Raises:
        ValueError: The two names are given different types.
    """
    kinds = [given[name] for name in ("type", "rope_type") if given.get(name) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ValueError(
            f"--rope-parameters: type={kinds[0]!r} and rope_type={kinds[1]!r} contradict each "
            "other: give one of them."
        )
    rest = {name: value for name, value in given.items() if name not in ("type", "rope_type")}
    return {**rest, "rope_type": kinds[0]} if kinds else rest


def _merged(text: Any, own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """One set of parameters with new ones over it. If the type changes, only those of the old that
    the new type reads stay.

    Raises:
        ValueError: The type is unknown, a parameter that it needs is missing, or it would not read
            one.
    """
    own, given = _with_type(own), _with_type(given)
    before = own.get("rope_type", "default")
    kind = given.get("rope_type", before)
    if kind not in list(READ):
        raise ValueError(
            f"--rope-parameters: there is no rope_type {kind!r}: it must be one of "
            f"{', '.join(READ)}{nearest(kind, READ)}"
        )
    needed, more = READ[kind]
    unread = given.keys() - {"rope_type", "rope_theta", *needed, *more}
    unread -= own.keys() - _SCALING  # a model's own, such as mrope_section
    if unread:
        raise ValueError(_on_unread(sorted(unread)[0], kind, "rope_type" in given, text))
    if kind != before:
        scaling = _SCALING - ({ORIGINAL} if ORIGINAL in needed else set())
        own = {name: value for name, value in own.items() if name not in scaling}
    merged = {"rope_type": kind, **own, **given}
    merged = {name: value for name, value in merged.items() if value is not None}
    if ORIGINAL in needed and ORIGINAL not in merged and before in ("default", "dynamic"):
        merged[ORIGINAL] = getattr(text, ORIGINAL, None) or text.max_position_embeddings
    missing = [name for name in needed if name not in merged]
    if missing:
        raise ValueError(f"--rope-parameters: rope_type {kind!r} needs {', '.join(missing)} too.")
    _check_values(text, merged, ("rope_theta", *needed, *more))
    return merged


def _on_unread(name: str, kind: str, said: bool, text: Any) -> str:
    start = f"--rope-parameters: {name} means nothing to rope_type {kind!r}"
    if not said:
        start += ", which is the model's own"
    if kind == "dynamic" and name == ORIGINAL:
        return f"{start}, which begins after max_position_embeddings: give that."
    types = [other for other, (needed, more) in READ.items() if name in (*needed, *more)]
    if types:
        return f"{start}: give a rope_type that reads it ({', '.join(types)}), or leave it out."
    return f"{start} of {text.model_type!r}: leave it out."


def _check_values(text: Any, merged: dict[str, Any], names: tuple[str, ...]) -> None:
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = int(width * (merged.get("partial_rotary_factor") or 1)) // 2
    for name in names:
        wanted = _wanted(name, merged[name], pairs) if name in merged else None
        if wanted is not None:
            raise ValueError(f"--rope-parameters: {name} must be {wanted}, got {merged[name]!r}.")
    for slow, fast, least, most in _RISING:
        if merged.get(slow, least) >= merged.get(fast, most):
            raise ValueError(
                f"--rope-parameters: {fast} must be more than {slow}, got "
                f"{merged.get(fast, most)} and {merged.get(slow, least)}."
            )


def _wanted(name: str, value: Any, pairs: int) -> str | None:
    """What a value must be, in words; None if it is right."""
    if name == "truncate":
        return None if isinstance(value, bool) else "true or false"
    if name in _LISTS:
        fine = isinstance(value, list) and len(value) == pairs and all(map(_positive, value))
        return None if fine else f"a list of {pairs} positive numbers, one for each frequency"
    if name == ORIGINAL:
        return None if _positive(value) and isinstance(value, int) else "a positive integer"
    if name == "factor":
        return None if _positive(value) and value >= 1 else "a number of at least 1"
    if name == "partial_rotary_factor":
        return None if _positive(value) and value <= 1 else "a number above 0 and at most 1"
    return None if _positive(value) else "a positive number"


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _check_saved(config: Any) -> None:
    """Raises ValueError if a model saved with this config loads with other positions."""
    from huggingface_hub.errors import StrictDataclassError

    wanted = config.get_text_config().rope_parameters
    try:
        loaded = type(config).from_dict(config.to_dict()).get_text_config().rope_parameters
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config.model_type!r} does not take these positions, {wanted}: "
            f"{error.__cause__ or error}"
        ) from error
    if loaded != wanted:
        raise ValueError(
            f"{config.model_type!r} does not take these positions: saved as {wanted}, they load as "
            f"{loaded}."
        )
