"""The model card of predictors: their purpose, their measurements, and how they were made."""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from lemo_hf.cards import PAPER, block, code, is_repository, plain, table
from lemo_hf.storage.files import whole_file
from lemo_hf.version import __version__

TAG = "lemo-predictor"  # by which the Hub's models are searched
_LAST_LINE = "Written by lemo-hf "

logger = logging.getLogger(__name__)


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
        base_model=base if is_repository(base) else None,
        tags=["lemo-hf", TAG, "lemo", "token-elimination", "long-context"],
        datasets=[name for name in datasets if is_repository(name)] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# LeMo predictors for {plain(base or info.base.model_type)}",
        f"Small networks which predict the {info.block_size}-token blocks of a long input that its "
        f"labels need, so that fine-tuning leaves out the others ([LeMo]({PAPER})). They are used "
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
        parts.append(table(rows))
    if command:
        parts.append(block("bash", command))
    parts += ["## Sizes", _sizes(layers), f"{_LAST_LINE}{__version__}."]
    return "\n\n".join(parts) + "\n"


def write_card(path: str, card: str) -> None:
    """Write a card, or replace the one of an earlier save; what the user wrote below it stays.

    A file that no save has written stays as it is, and a warning says so.
    """
    below = ""
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
        _, last_line, below = text.partition(_LAST_LINE)
        if TAG not in text or not last_line:
            logger.warning("%s is no card of a predictor: it stays as it is.", path)
            return
        below = below.partition("\n")[2]
    with (
        whole_file(path) as part,
        open(part, "w", encoding="utf-8", errors="surrogateescape") as file,
    ):
        file.write(card + below)


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
    return f"{block('python', example)}\n\nSettings of your own: {code(settings)}."


def _recall(rows: list[dict[str, Any]]) -> str:
    """Table of recall: a line for each kind of documents, retention and layer, and a column for
    each ranking."""
    lines: dict[tuple, dict[str, Any]] = {}
    names = ("documents", "retention", "layer")
    for row in rows:
        key = tuple(row[name] for name in names)
        line = lines.setdefault(key, dict(zip(names, key, strict=True)))
        line[row["policy"]] = f"{row['recall']:.3f}"
    return (
        "Share of the blocks that the attention of the upper layers looks at most, which each "
        "ranking keeps too.\n\n" + table(list(lines.values()))
    )


def _base(base: Any) -> str:
    name = code(base.name) if base.name else "a model without a name"
    commit = f" at commit {code(base.commit)}" if base.commit else ""
    weights = f" Weights: {code(base.fingerprint[:16])}." if base.fingerprint else ""
    return (
        f"For {name}{commit}: {code(base.model_type)}, {base.num_hidden_layers} layers, "
        f"hidden size {base.hidden_size}.{weights}"
    )


def _sizes(layers: Sequence[Any]) -> str:
    counts = [
        {"layer": i, "parameters": sum(p.numel() for p in network.parameters())}
        for i, network in enumerate(layers)
        if network is not None
    ]
    return table(counts)
