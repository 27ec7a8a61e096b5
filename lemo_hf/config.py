"""`LeMoConfig`: every number that a user may set, and its checks."""

import dataclasses
import logging
import os
from dataclasses import dataclass
from typing import Any

from lemo_hf.config_checks import (
    KEEPS_ALL,
    LEVELS,
    POLICIES,
    UNITS,
    check_values,
    knows_its_fields,
)
from lemo_hf.shown import nearest, shortened, shown
from lemo_hf.storage.config_file import write_config
from lemo_hf.storage.files import CONFIG_NAME, find_files, read_json
from lemo_hf.version import __version__

__all__ = ["LEVELS", "POLICIES", "UNITS", "KeepRule", "LeMoConfig"]

logger = logging.getLogger(__name__)

# By "auto": share of the steps, at the end, that keep all of rows that are labelled throughout.
AUTO_FINISH = 0.1
# And share of the blocks kept by overlap that are drawn by chance: three seeds, docs/QUALITY.md.
AUTO_CHANCE = 0.25
# Fields of earlier versions, their default, and what takes their place.
_REMOVED = {
    "normalize_scores": (False, "policy='recent' keeps nearly the same blocks (docs/LOG.md)."),
}


@dataclass(frozen=True)
class KeepRule:
    """What a sublayer keeps of a row: a share or a threshold; the other is None.

    Attributes:
        retention: Share of the row's blocks that is kept, the best ones first.
        threshold: Least score of a kept block, as a multiple of the row's mean score.
    """

    retention: float | None = None
    threshold: float | None = None


def check_config(value: Any) -> None:
    """Raises ValueError unless ``value`` is a `LeMoConfig`; says how to make one of it."""
    if isinstance(value, LeMoConfig):
        return
    way_out = "give LeMoConfig(...)"
    if isinstance(value, dict):
        way_out = "write LeMoConfig(**values), or LeMoConfig.from_dict(values)"
    elif isinstance(value, str | os.PathLike):
        way_out = f"write LeMoConfig.from_pretrained({os.fspath(value)!r})"
    raise ValueError(f"lemo_config must be a LeMoConfig, got {shown(value)}: {way_out}.")


@knows_its_fields
@dataclass(frozen=True)
class LeMoConfig:
    """Settings of LeMo: what each layer leaves out, and how this is chosen.

    Args:
        retention: Share of the blocks that each attention keeps, in (0, 1]. One number, or one per
            decoder layer (entries of the dense first and last layers must then be 1). ``None``:
            0.3, unless ``threshold`` is given.
        threshold: Least score of a kept block, as a multiple of the mean score of its row's blocks,
            instead of ``retention``. It depends neither on the length of the row nor on the scale
            of the scores. Rows keep different shares; 0 keeps everything. One number of at least 0,
            or one per decoder layer (entries of dense layers must then be 0). The host waits for
            the scores of each choice, since they decide the shapes.
        mlp_retention: Share of the blocks that each MLP keeps, with a kept set of its own, chosen
            by its intermediate activation. Like ``retention``. Without it and ``mlp_threshold`` an
            MLP keeps what its layer's attention keeps.
        mlp_threshold: Threshold of the MLPs, instead of ``mlp_retention``. Like ``threshold``.
        block_size: Neighbouring tokens that are kept or left out together.
        policy: Ranking of the blocks; in packed rows, of those of each document. ``"overlap"``: by
            rare words shared with label blocks, for rows whose labels cover only a part.
            ``"chunks"``: by chance, runs of ``chunk_size`` neighbouring tokens, others at each
            step, for rows that are labelled throughout. ``"auto"``: for each row the one of these
            two that fits it. ``"recent"``: the last blocks first, as if the row were cut.
            ``"window"``: neighbours from a random place on. ``"random"``: blocks by chance.
            ``"pooled"``: by how much label blocks attend to a block, from mean queries and mean
            keys. ``"oracle"``: the same from all queries and keys of the layer; exact and slow.
            ``"predictor"``: by the networks of ``predictor``, or those given to `apply_lemo`; in
            rows whose labels cover a part, half of the blocks by overlap. ``None``: ``"predictor"``
            if one is given, ``"pooled"`` with a threshold, else ``"auto"``.
        chunk_size: Neighbouring tokens that ``"chunks"`` keeps together, in whole blocks.
        random_share: Share of the kept blocks that ``"overlap"`` and ``"predictor"`` leave to
            ``"chunks"``, so that other blocks are seen too, in [0, 1). ``None``: 0.25 under
            ``"auto"``, else 0.
        dense_finish: Share of the optimizer steps, in [0, 1], that are the finish: the last steps,
            in which every row keeps ``finish_retention`` of its blocks. They repair what sparse
            training leaves. ``None``: 0.1 for rows that are labelled throughout under ``"auto"``,
            else 0. Trainers count the steps; in a loop of your own call `LeMo.begin_step`.
        finish_retention: Share of the blocks that rows keep in the finish, in (0, 1]; below 1 if a
            dense step does not fit the memory, but not below ``retention``.
        predictor: Learned predictors to load: a directory, a Hub repository, or ``"auto"`` for
            those that the Hub has for the model.
        predictor_revision: Branch, tag or commit of that repository.
        agree_across_layers: One kept set for all sparse layers, chosen at the first of them; False:
            each layer chooses its own.
        dense_first_layers: Number of layers at the bottom that keep every token.
        dense_last_layers: Number of layers at the top that keep every token.
        supervise: Tokens that have a loss. ``"kept"``: a token that is left out more often than the
            average token of its row has none, and the mean over the others stands for the row.
            ``"all"``: every label counts, as in the paper.
        segment_size: Tokens whose logits exist at one time. ``None``: as many as take a tenth of
            the memory of hidden states and head.
        recompute: Part of a layer that the backward computes again instead of storing it, for all
            layers or one entry a layer. ``"none"``: nothing. ``"mlp"``: the MLPs. ``"selective"``:
            everything but attention and its output projection; a layer stores its kept rows,
            attention's output and the sum of both. ``"lean"``: everything but attention; a layer
            does not store that sum. ``"full"``: everything; a layer stores its kept rows alone.
            ``None`` follows the model's gradient checkpointing: ``"none"`` without it; with it the
            first of ``"selective"``, ``"lean"`` and ``"full"`` that the memory allows.
        offload_gib: Pinned host memory, GiB, for what ``"selective"``, ``"lean"`` and ``"full"``
            store; copies run beside the computation. ``None``: nothing is offloaded.
        sequence_parallel_size: Number of processes, neighbours by rank, that share each sequence.
            Each holds a part of the stream, works on an equal share of the kept tokens, and
            computes some of the attention heads. For training only; 1: each process has sequences
            of its own.
        cuda_graphs: Whether training uses CUDA graphs, on a GPU: from the third batch of a shape
            on, one launch runs forward and backward, so that short rows do not wait for the host.
            `CudaGraphs` says which batches can.
        fp8: Whether products with frozen weights are in FP8, in the forward and for the gradient of
            the input; on a Hopper GPU or newer. The FP8 copies take one byte a weight.
        bf16_finish: Share of the optimizer steps, at the end, in which ``fp8`` is off, so that
            adapters learn to fit the weights as they are, in [0, 1]. In a loop of your own call
            `LeMo.begin_step`.
        seed: Seed of everything drawn by chance, any integer.

    Raises:
        ValueError: A value is out of range; the message names the field and the value.

    Source: LeMo, arXiv:2501.09767.
    """

    retention: float | tuple[float, ...] | None = None
    threshold: float | tuple[float, ...] | None = None
    mlp_retention: float | tuple[float, ...] | None = None
    mlp_threshold: float | tuple[float, ...] | None = None
    block_size: int = 64
    policy: str | None = None
    chunk_size: int = 512
    random_share: float | None = None
    dense_finish: float | None = None
    finish_retention: float = 1.0
    predictor: str | None = None
    predictor_revision: str | None = None
    agree_across_layers: bool = True
    dense_first_layers: int = 0
    dense_last_layers: int = 0
    supervise: str = "kept"
    segment_size: int | None = None
    recompute: str | tuple[str, ...] | None = None
    offload_gib: float | None = None
    sequence_parallel_size: int = 1
    cuda_graphs: bool = False
    fp8: bool = False
    bf16_finish: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        self._settle_policy()
        for name in (*KEEPS_ALL, "recompute"):
            if isinstance(value := getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(value))
        if self.retention is None and self.threshold is None:
            object.__setattr__(self, "retention", 0.3)
        check_values(self)

    @property
    def chance(self) -> float:
        """Share of the kept blocks that is drawn by chance instead of by score."""
        if self.random_share is not None:
            return self.random_share
        return AUTO_CHANCE if self.policy == "auto" else 0.0

    @property
    def finish(self) -> float:
        """Share of the optimizer steps that are the finish."""
        if self.dense_finish is not None:
            return self.dense_finish
        return AUTO_FINISH if self.policy == "auto" else 0.0

    def recompute_levels(self, num_layers: int) -> list[str | None]:
        """The ``recompute`` of each layer; None if the model's gradient checkpointing decides.

        Raises:
            ValueError: A list has another length than the model has layers.
        """
        if not isinstance(self.recompute, tuple):
            return [self.recompute] * num_layers
        if len(self.recompute) != num_layers:
            raise ValueError(
                f"recompute has {len(self.recompute)} entries, the model has {num_layers} layers: "
                "give one level or one a layer."
            )
        return list(self.recompute)

    def _settle_policy(self) -> None:
        for name in ("predictor", "predictor_revision"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, value := os.fspath(value))
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be a string or None, got {shown(value)}")
        if self.predictor is None and self.predictor_revision is not None:
            raise ValueError(
                f"predictor_revision={shown(self.predictor_revision)} needs a predictor: set "
                "predictor='organisation/name'."
            )
        if self.policy is None:
            # A threshold compares scores, and those of "auto" are but ranks.
            by_score = self.threshold is not None or self.mlp_threshold is not None
            policy = "pooled" if by_score else "auto"
            object.__setattr__(self, "policy", "predictor" if self.predictor else policy)
        elif self.predictor is not None and self.policy != "predictor":
            raise ValueError(
                f"predictor={shown(self.predictor)} and policy={self.policy!r} cannot both choose "
                "the blocks: leave one of them unset."
            )

    def layer_rules(self, num_layers: int) -> list[tuple[KeepRule, KeepRule | None] | None]:
        """What attention and MLP of each layer keep; None for a dense layer.

        The MLP's rule is None if the MLP shares the attention's kept set.

        Raises:
            ValueError: A list's length is not the number of layers, no layer is sparse, a dense
                layer's entry leaves something out, or layers that share a kept set have different
                entries.
        """
        first, last = self.dense_first_layers, self.dense_last_layers
        if first + last >= num_layers:
            raise ValueError(
                f"dense_first_layers={first} and dense_last_layers={last} leave no sparse layer: "
                f"the model has {num_layers}. Lower them."
            )
        sparse = range(first, num_layers - last)
        per_layer = {}
        for name, keeps_all in KEEPS_ALL.items():
            value = getattr(self, name)
            if not isinstance(value, tuple):
                per_layer[name] = [value] * num_layers
                continue
            if len(value) != num_layers:
                raise ValueError(
                    f"{name} has {len(value)} entries, the model has {num_layers} layers: "
                    "give one number or one a layer."
                )
            wrong = [i for i in range(num_layers) if i not in sparse and value[i] != keeps_all]
            if wrong:
                raise ValueError(
                    f"{name} of layer {wrong[0]} is {value[wrong[0]]}, but the layer is dense by "
                    f"dense_first_layers={first}, dense_last_layers={last}: set it to {keeps_all}."
                )
            if self.agree_across_layers and len({value[i] for i in sparse}) > 1:
                raise ValueError(
                    f"{name}={shown(value)} differs between layers, which then cannot agree on one "
                    "kept set: give one value, or set agree_across_layers=False."
                )
            per_layer[name] = list(value)
        attention = map(KeepRule, per_layer["retention"], per_layer["threshold"])
        mlp = map(KeepRule, per_layer["mlp_retention"], per_layer["mlp_threshold"])
        return [
            (rule, None if mlp_rule == KeepRule() else mlp_rule) if i in sparse else None
            for i, (rule, mlp_rule) in enumerate(zip(attention, mlp, strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields and the version of lemo-hf, as a dictionary for JSON."""
        return {"lemo_version": __version__, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LeMoConfig":
        """The config that `to_dict` wrote. Missing fields take their defaults.

        Fields that this version no longer has are ignored, with a warning if they were set.

        Raises:
            ValueError: A key is unknown (the message names it), or a value is out of range.
        """
        written_by = values.get("lemo_version")
        values = {key: value for key, value in values.items() if key != "lemo_version"}
        for name, (default, instead) in _REMOVED.items():
            if values.pop(name, default) != default:
                logger.warning(
                    "%s in a LeMoConfig of lemo_hf %s is ignored: this version has no such field. "
                    "%s",
                    *(name, shown(written_by), instead),
                )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            names = shortened(", ".join(sorted(unknown)))
            raise ValueError(
                f"unknown keys in a LeMoConfig: {names}{nearest(sorted(unknown)[0], known)} If a "
                "newer version of lemo-hf wrote them, update it (pip install -U lemo-hf); "
                "otherwise correct or remove them."
            )
        return cls(**values)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, replace_predictor: bool = False
    ) -> None:
        """Write ``lemo_config.json`` into ``save_directory``, which is made if missing.

        If ``save_directory`` is this config's own ``predictor``, what the file there says of the
        predictor is kept.

        Raises:
            ValueError: Another predictor lies there, and ``replace_predictor`` is False.
        """
        write_config(save_directory, self.to_dict(), replace_predictor)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike, **hub_kwargs: Any) -> "LeMoConfig":
        """Read ``lemo_config.json`` from a directory or a Hub repository.

        If predictors lie beside the file, the config is the one recommended for them, and its
        ``predictor`` is ``path_or_repo``.

        Args:
            path_or_repo: Directory, or Hub repository id.
            **hub_kwargs: Arguments of `hf_hub_download`: ``revision``, ``token``, ``cache_dir``.

        Raises:
            OSError: There is no such directory or repository, or it cannot be reached.
            ValueError: The file is missing, is not JSON, or has a wrong value.
        """
        (path,) = find_files(path_or_repo, [CONFIG_NAME], **hub_kwargs)
        values = read_json(path)
        if isinstance(values.get("predictor"), dict):
            revision = None if os.path.isdir(path_or_repo) else hub_kwargs.get("revision")
            values |= {"predictor": os.fspath(path_or_repo), "predictor_revision": revision}
        return cls.from_dict(values)
