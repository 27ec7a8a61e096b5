"""`LeMoConfig`: every number a user may set, checked once."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from lemo_hf.version import __version__

CONFIG_NAME = "lemo_config.json"
POLICIES = ("oracle", "pooled", "random", "recent", "predictor")
SUPERVISE = ("kept", "all")


@dataclass(frozen=True)
class LeMoConfig:
    """What is left out of which layer, and how that is chosen.

    Args:
        retention: Share of the token blocks each attention keeps, in (0, 1]. One number, or one
            per decoder layer (the dense first and last layers' entries must then be 1).
        mlp_retention: The same for the MLPs, with a kept set of their own, chosen by the MLP's
            intermediate activation. ``None``: the MLP keeps what its layer's attention keeps.
        block_size: Tokens that are kept or eliminated together.
        policy: What ranks the blocks. ``"pooled"``: attention scores of mean-pooled queries and
            keys, no training needed. ``"oracle"``: the paper's score from the layer's real queries
            and keys; exact and slow. ``"random"``, ``"recent"``: baselines. ``"predictor"``:
            predictors given to `apply_lemo`.
        agree_across_layers: One kept set for all sparse layers, chosen at the first of them;
            otherwise each layer chooses its own.
        normalize_scores: Divide a block's score by the number of query blocks that can see it.
            On plain text that keeps mostly the most recent blocks, whatever the text says; it
            costs less perplexity and leaves out far context. ``False`` is the paper's sum.
        dense_first_layers: Layers at the bottom that keep every token.
        dense_last_layers: Layers at the top that keep every token.
        supervise: ``"kept"``: a token that is eliminated more often than the average of its
            sequence is not asked to predict, and the mean over the others stands for the
            sequence. ``"all"``: the loss covers every label, as in the paper.
        segment_size: Tokens whose logits exist at a time; None: a tenth of the memory that hidden
            states and head take.
        checkpoint_kept_rows: Store only a layer's kept rows and recompute the rest in the
            backward. ``None`` follows ``gradient_checkpointing`` of the model.
        seed: Of the random policy.

    Raises:
        ValueError: A value is out of range; the message names the field and the value.

    Source: LeMo, arXiv:2501.09767.
    """

    retention: float | tuple[float, ...] = 0.5
    mlp_retention: float | tuple[float, ...] | None = None
    block_size: int = 64
    policy: str = "pooled"
    agree_across_layers: bool = True
    normalize_scores: bool = False
    dense_first_layers: int = 0
    dense_last_layers: int = 0
    supervise: str = "kept"
    segment_size: int | None = None
    checkpoint_kept_rows: bool | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("retention", "mlp_retention"):
            value = getattr(self, name)
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, name, value := tuple(value))
            if value is None and name == "mlp_retention":
                continue
            for share in value if isinstance(value, tuple) else (value,):
                if not _is_number(share) or not 0 < share <= 1:
                    raise ValueError(
                        f"{name} must lie in (0, 1], got {share!r} in {name}={value!r}"
                    )
        for name, least in (
            ("block_size", 1),
            ("segment_size", 1),
            ("dense_first_layers", 0),
            ("dense_last_layers", 0),
        ):
            value = getattr(self, name)
            if value is None and name == "segment_size":
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, choices in (("policy", POLICIES), ("supervise", SUPERVISE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, choices in (
            ("agree_across_layers", (True, False)),
            ("normalize_scores", (True, False)),
            ("checkpoint_kept_rows", (True, False, None)),
        ):
            value = getattr(self, name)
            if type(value) not in (bool, type(None)) or value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be an integer, got {self.seed!r}")

    def layer_retentions(self, num_layers: int) -> list[tuple[float, float | None] | None]:
        """Attention's and MLP's retention of each layer; None for a dense layer.

        The MLP's is None where it shares the attention's kept set.

        Raises:
            ValueError: A list has another length than the model has layers, no layer is sparse,
                a dense layer has a retention below 1, or layers that agree differ in retention.
        """
        first, last = self.dense_first_layers, self.dense_last_layers
        if first + last >= num_layers:
            raise ValueError(
                f"dense_first_layers={first} and dense_last_layers={last} leave no sparse layer: "
                f"the model has {num_layers}. Lower them."
            )
        sparse = range(first, num_layers - last)
        per_layer = {}
        for name in ("retention", "mlp_retention"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                per_layer[name] = [value] * num_layers
                continue
            if len(value) != num_layers:
                raise ValueError(
                    f"{name} has {len(value)} entries, the model has {num_layers} layers: "
                    "give one number or one a layer."
                )
            wrong = [i for i in range(num_layers) if i not in sparse and value[i] != 1]
            if wrong:
                raise ValueError(
                    f"{name} of layer {wrong[0]} is {value[wrong[0]]}, but the layer is dense by "
                    f"dense_first_layers={first}, dense_last_layers={last}: set it to 1."
                )
            if self.agree_across_layers and len({value[i] for i in sparse}) > 1:
                raise ValueError(
                    f"{name}={value!r} differs between layers, which then cannot agree on one kept "
                    "set: set agree_across_layers=False."
                )
            per_layer[name] = list(value)
        return [
            (per_layer["retention"][i], per_layer["mlp_retention"][i]) if i in sparse else None
            for i in range(num_layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields and the version of lemo-hf, as JSON knows them."""
        return {"lemo_version": __version__, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LeMoConfig":
        """The reverse of `to_dict`. Missing fields take their defaults.

        Raises:
            ValueError: Unknown keys (they are named), or a value out of range.
        """
        values = {key: value for key, value in values.items() if key != "lemo_version"}
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys in a LeMoConfig: {', '.join(unknown)}")
        return cls(**values)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write ``lemo_config.json`` into ``save_directory``, which is made if missing."""
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, CONFIG_NAME), "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write("\n")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike, **hub_kwargs) -> "LeMoConfig":
        """Read ``lemo_config.json`` from a directory or a Hub repository.

        Args:
            path_or_repo: Directory, or repository id.
            **hub_kwargs: ``revision``, ``token``, ``cache_dir`` for `hf_hub_download`.
        """
        path = os.path.join(path_or_repo, CONFIG_NAME)
        if not os.path.isdir(path_or_repo):
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(str(path_or_repo), CONFIG_NAME, **hub_kwargs)
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
