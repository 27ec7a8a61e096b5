"""The model card of predictors: their purpose, their measurements, and how they were made."""

import html
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from lemo_hf.version import __version__

TAG = "lemo-predictor"  # by which the Hub's models are searched
_PAPER = "https://arxiv.org/abs/2501.09767"


def model_card(info: Any, layers: Sequence[Any], source: str) -> str:
    """The text of ``README.md``. Every number in it comes from the arguments.

    Args:
        info: Facts about the predictors.
        layers: Predictors, one entry a layer; None where there is none.
        source: Repository id or directory that users load.
    """
    from huggingface_hub import ModelCardData

    training = dict(info.training)
    datasets = training.pop("datasets", None) or []
    command = training.pop("command", None)
    base = info.base.name
    data = ModelCardData(
        library_name="lemo-hf",
        base_model=base if _is_repository(base) else None,
        tags=["lemo-hf", TAG, "lemo", "token-elimination", "long-context"],
        datasets=[name for name in datasets if _is_repository(name)] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# LeMo predictors for {_plain(base or info.base.model_type)}",
        f"Small networks which predict the {info.block_size}-token blocks of a long input that its "
        f"labels need, so that fine-tuning leaves out the others ([LeMo]({_PAPER})). They are used "
        "in training alone: what is trained with them is evaluated and saved as the plain model.",
        _how_to_use(info, source),
        "## Recall of the blocks that are needed",
        _recall(info.recall) if info.recall else "Not measured.",
    ]
    parts += ["## Training", _base(info.base)]
    rows = [{"setting": name, "value": value} for name, value in training.items()]
    if datasets:
        rows.insert(0, {"setting": "datasets", "value": ", ".join(datasets)})
    if rows:
        parts.append(_table(rows))
    if command:
        parts.append(_block("bash", command))
    parts += ["## Sizes", _sizes(layers), f"Written by lemo-hf {__version__}."]
    return "\n\n".join(parts) + "\n"


def _how_to_use(info: Any, source: str) -> str:
    literal = json.dumps(source, ensure_ascii=False)  # which is Python, too, whatever stands in it
    example = (
        "from lemo_hf import LeMoConfig, LeMoTrainer\n\n"
        f"lemo_config = LeMoConfig.from_pretrained({literal})\n"
        "trainer = LeMoTrainer("
        "model=model, args=args, train_dataset=dataset, lemo_config=lemo_config)\n"
        "trainer.train()"
    )
    settings = f"LeMoConfig(predictor={literal}, block_size={info.block_size}, ...)"
    return f"{_block('python', example)}\n\nSettings of your own: {_code(settings)}."


def _recall(table: list[dict[str, Any]]) -> str:
    """Table of recall: a line for each kind of documents, retention and layer, and a column for
    each ranking."""
    lines: dict[tuple, dict[str, Any]] = {}
    names = ("documents", "retention", "layer")
    for row in table:
        key = tuple(row[name] for name in names)
        line = lines.setdefault(key, dict(zip(names, key, strict=True)))
        line[row["policy"]] = f"{row['recall']:.3f}"
    return (
        "Share of the blocks that the attention of the upper layers looks at most, which each "
        "ranking keeps too.\n\n" + _table(list(lines.values()))
    )


def _base(base: Any) -> str:
    name = _code(base.name) if base.name else "a model without a name"
    commit = f" at commit {_code(base.commit)}" if base.commit else ""
    weights = f" Weights: {_code(base.fingerprint[:16])}." if base.fingerprint else ""
    return (
        f"For {name}{commit}: {_code(base.model_type)}, {base.num_hidden_layers} layers, "
        f"hidden size {base.hidden_size}.{weights}"
    )


def _sizes(layers: Sequence[Any]) -> str:
    counts = [
        {"layer": i, "parameters": sum(p.numel() for p in network.parameters())}
        for i, network in enumerate(layers)
        if network is not None
    ]
    return _table(counts)


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [
        list(map(_cell, names)),
        ["---"] * len(names),
        *([_cell(row.get(name)) for name in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if type(value) is float:
        return f"{value:.4g}"
    if type(value) is int:
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return _plain(text)


def _plain(text: str) -> str:
    """``text`` escaped for a line or a cell, so that it begins no HTML, link, code or column."""
    words = " ".join(html.escape(text, quote=False).split())
    return re.sub(r"([\\|`]|\](?=[(\[]))", r"\\\1", words)


def _code(text: str) -> str:
    """A span of code, in more backticks than it has in a row."""
    words = " ".join(text.split())
    ticks = _more_ticks(words, 1)
    space = " " if "`" in words else ""
    return f"{ticks}{space}{words}{space}{ticks}"


def _block(language: str, text: str) -> str:
    """A block of code, likewise."""
    ticks = _more_ticks(text, 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _more_ticks(text: str, least: int) -> str:
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def _is_repository(name: str | None) -> bool:
    """Whether ``name`` can be the id of a repository; a directory says nothing to others."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return name is not None and not os.path.exists(name)
