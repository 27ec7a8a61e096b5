"""Plain words for what trains and what does not, in a run and in a batch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lemo_hf.batch.row_counts import RowCounts
from lemo_hf.batch.selection import num_kept_blocks
from lemo_hf.config import UNITS, KeepRule, LeMoConfig

_BEST = {
    "overlap": "the blocks with labels and those that share rare words with them",
    "recent": "the last blocks: what cutting the row would keep",
    "window": "neighbouring blocks from a random place on, another at each step",
    "random": "blocks by chance, others at each step",
    "pooled": "the blocks that others attend to most, by their mean queries and keys",
    "oracle": "the blocks that others attend to most",
    "predictor": "the blocks that a predictor says others attend to most",
}
_WHERE = "where labels cover a part of a row"


def brief(config: LeMoConfig) -> str:
    """The fields that are not at their defaults, in one line."""
    default = vars(LeMoConfig())
    changed = (f"{k}={v!r}" for k, v in vars(config).items() if v != default[k])
    return f"LeMoConfig({', '.join(changed)})"


def describe_run(
    config: LeMoConfig,
    rules: Sequence[tuple[KeepRule, KeepRule | None] | None],
    attention: str,
    predictor: str | None,
    asks: bool | None = None,
) -> str:
    """One line on a run: which layers leave out how much, how it is chosen, the schedule, and what
    stays dense.

    Args:
        config: The user's settings.
        rules: What each layer keeps, as `LeMoConfig.layer_rules` returns it.
        attention: Name of the kernels that run attention.
        predictor: Description of the learned predictors, or None.
        asks: Whether labels cover only a part of each row of the run, and not all of it. None: it
            is not known, or rows are of both kinds, and so both are described.
    """
    pairs = [pair for pair in rules if pair is not None]
    sparse = [i for i, pair in enumerate(rules) if pair is not None]
    mlp = [rule for _, rule in pairs if rule is not None]
    mlp_text = f"MLP {_span(mlp)}" if mlp else "MLP on the same rows"
    one = "one kept set for all" if config.agree_across_layers else "a kept set each"
    others = "The other layers, evaluation" if len(sparse) < len(rules) else "Evaluation"
    learned = "" if predictor is None else f" ({predictor})"
    return (
        f"LeMo: {len(sparse)} of {len(rules)} layers ({sparse[0]} to {sparse[-1]}) are sparse, "
        f"attention {_span([rule for rule, _ in pairs])}, {mlp_text}, {config.block_size}-token "
        f"blocks, {one}. Kept: {_kept(config, asks)}{learned}; always the first and the last block "
        f"of each document{_labelled(asks)}. {describe_finish(config, asks)}"
        f"Loss on {config.supervise} tokens, attention by {attention}. "
        f"{describe_products(config)}"
        f"{others} and generation stay dense."
    )


def _labelled(asks: bool | None) -> str:
    """That blocks with labels are always kept, of rows of which this is true."""
    if asks is None:
        return f" and every block with a label {_WHERE}"
    return " and every block with a label" if asks else ""


def _kept(config: LeMoConfig, asks: bool | None) -> str:
    chunks = f"runs of {config.chunk_size} tokens by chance, others at each step"
    chance = f", {config.chance:.0%} of them by chance" if config.chance else ""
    if config.policy == "chunks" or (config.policy == "auto" and asks is False):
        return chunks
    if config.policy == "auto":
        sharing = _BEST["overlap"] + chance
        return sharing if asks else f"{_WHERE}, {sharing}; where they cover all of it, {chunks}"
    assert config.policy is not None  # settled when the config was made
    half = ""
    if config.policy == "predictor" and asks is not False:
        where = "" if asks else f" {_WHERE},"
        half = f", and{where} for half of them those that share rare words with the labels"
    return f"{_BEST[config.policy]}{half}{chance}"


def describe_products(config: LeMoConfig) -> str:
    """One sentence and a space on products in FP8; empty if there are none and none were asked."""
    if not config.fp8:
        share = config.bf16_finish
        unread = f"bf16_finish={share:g} has no effect: set fp8=True, or leave it out. "
        return "" if share == LeMoConfig.bf16_finish else unread
    last = f", in bf16 in the last {100 * config.bf16_finish:.3g}% of the steps"
    return f"Products with frozen weights in FP8{last if config.bf16_finish else ''}. "


def describe_finish(config: LeMoConfig, asks: bool | None = None) -> str:
    """One sentence and a space on the finish; without one empty, if nothing was asked of it.

    ``asks`` is as for `describe_run`.
    """
    if not config.finish or (asks and config.dense_finish is None):
        kept = config.finish_retention
        unread = f"finish_retention={kept:g} has no effect: set dense_finish, or leave it out. "
        return unread if kept < 1 else ""
    every = config.dense_finish is not None or asks is False
    rows = "" if every else " for rows that are labelled throughout"
    said = _finish(config)
    return f"{said[0].upper()}{said[1:]}{rows}. "


def _finish(config: LeMoConfig) -> str:
    much = "are dense"
    if config.finish_retention < 1:
        much = f"keep {config.finish_retention:.0%} of the blocks"
    return f"the last {100 * config.finish:.3g}% of the steps {much}"


def describe_batch(
    config: LeMoConfig,
    rows: Sequence[RowCounts],
    slots: Mapping[str, Sequence[tuple[int, int]]],
    documents: Sequence[int],
) -> str:
    """One line on the longest row of a batch: its labels, how many tokens train, and which.

    Args:
        config: The user's settings.
        rows: Counts of the rows.
        slots: Fewest and most tokens of each row that a sparse layer keeps for its
            ``"attention"``, and for its ``"mlp"`` if that chooses for itself.
        documents: Number of the documents in each row.
    """
    longest = max(range(len(rows)), key=lambda i: rows[i].tokens)
    row, kept = rows[longest], {name: counts[longest] for name, counts in slots.items()}
    labels = f"labels on {row.labels:,} of them" if row.label_blocks else "labels throughout"
    if not row.labels:
        labels = "no labels"
    said, short = f"LeMo: of a {row.tokens:,}-token row ({labels}) ", "it is too short, or has"
    if documents[longest] > 1:
        said = f"LeMo: of {documents[longest]:,} documents packed in a row of {row.tokens:,} tokens"
        said, short = f"{said} ({labels}) ", "the documents are too short, or have"
    if min(fewest for fewest, _ in kept.values()) >= row.tokens:
        return f"{said}all tokens train: {short} too many labels, to leave any out."
    attention = kept.get(
        "attention", (row.tokens, row.tokens)
    )  # which chooses nothing if it keeps all
    said += f"about {_share(attention, row, config, config.retention)} train in "
    if "mlp" in kept:
        own = _share(kept["mlp"], row, config, config.mlp_retention)
        said += f"the attention of each sparse layer and about {own} in its MLP"
    else:
        said += "each sparse layer"
    fewest = [min(low for low, _ in counts) for counts in zip(*slots.values(), strict=True)]
    whole = sum(row.tokens <= kept for row, kept in zip(rows, fewest, strict=True))
    if whole:
        said += f" ({whole} of the {len(rows)} rows of this batch are too short to leave any out)"
    finish = config.finish if config.dense_finish is not None or not row.label_blocks else 0
    if not finish:
        return f"{said}, in every step."
    return f"{said}; {_finish(config)}."


def describe_offload(config: LeMoConfig, layers: Iterable[Any]) -> str:
    """A space and one sentence if nothing is offloaded though the config says so; else empty.

    Args:
        config: The user's settings.
        layers: The model's layers, which know whether its gradient checkpointing is on.
    """
    checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    levels = config.recompute if isinstance(config.recompute, tuple) else (config.recompute,)
    if config.offload_gib is None or checkpointing or {*UNITS} & {*levels}:
        return ""
    return (
        f" offload_gib={config.offload_gib:g} has no effect: no layer is computed again (set "
        "activation_checkpointing=True, or recompute)."
    )


def _share(span: tuple[int, int], row: RowCounts, config: LeMoConfig, asked: Any) -> str:
    """How many tokens, which share of the row that is, and why it is more than ``asked``."""
    low, kept = span
    if low < kept:  # layers differ
        return f"{low:,} to {kept:,} tokens ({low / row.tokens:.0%} to {kept / row.tokens:.0%})"
    said = f"{kept:,} tokens ({kept / row.tokens:.0%}"
    if not isinstance(asked, int | float) or kept < (asked + 0.01) * row.tokens:
        return f"{said})"
    why = f"shares are rounded up to whole {config.block_size}-token blocks"
    if row.required_blocks > num_kept_blocks(asked, row.blocks):
        why = "first and last blocks of documents, and blocks with labels, always stay"
    return f"{said}, not {asked:.0%}: {why})"


def _span(rules: list[KeepRule]) -> str:
    name = "retention" if rules[0].threshold is None else "threshold"
    values = [getattr(rule, name) for rule in rules]
    low, high = min(values), max(values)
    return f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}"
