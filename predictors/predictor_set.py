"""`LeMoPredictor`: the learned predictors of one base model, in memory, in files and on the Hub."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from lemo_hf.config import LeMoConfig
from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.predictors.model_card import model_card, write_card
from lemo_hf.predictors.predictor_files import (
    named_weights,
    read_section,
    read_tensors,
    write_predictor_files,
)
from lemo_hf.shown import shortened, shown
from lemo_hf.storage.files import CONFIG_NAME, WEIGHTS_NAME, find_files
from lemo_hf.storage.outputs import locked


@dataclass(frozen=True)
class PredictorInfo:
    """Facts about predictors: what they were trained for, and how well they do; all of it JSON.

    Attributes:
        block_size: Tokens a block.
        base: Base model that they were trained for.
        recall: Measured recall, rows as `lemo_hf.tune.recall.recall_table` returns them.
        training: Facts of how they were made. The model card has places for ``"datasets"`` (Hub
            ids) and ``"command"``, and lists all others (tokens, epochs, ...).

    Raises:
        ValueError: The block size is not a positive integer, or a fact has the wrong type.
    """

    block_size: int
    base: BaseModel
    recall: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(
                f"block_size must be an integer of at least 1, got {shown(self.block_size)}"
            )
        if not isinstance(self.recall, list) or not all(map(_is_recall, self.recall)):
            raise ValueError(
                "recall must be rows with 'documents', 'policy', 'layer', 'retention' and 'recall',"
                f" got {shown(self.recall)}"
            )
        if not isinstance(self.training, dict):
            raise ValueError(f"training must be facts by name, got {shown(self.training)}")
        datasets, command = self.training.get("datasets"), self.training.get("command")
        names = [] if datasets is None else datasets
        if not isinstance(names, list | tuple) or not all(isinstance(x, str) for x in names):
            raise ValueError(f"training's datasets must be names, got {shown(datasets)}")
        if not isinstance(command, str | None):
            raise ValueError(f"training's command must be text, got {shown(command)}")


class LeMoPredictor(nn.Module):
    """Small networks for some decoder layers, which predict which blocks are needed from there on.

    Args:
        info: Facts about the networks: what they were trained for.
        layers: One `BlockPredictor` for each decoder layer; None for a layer without one.

    Raises:
        ValueError: ``layers`` does not have one entry for each layer of the base model, has no
            predictor at all, or has one whose sizes differ from ``info``.
    """

    def __init__(self, info: PredictorInfo, layers: Sequence[BlockPredictor | None]):
        super().__init__()
        self.info = info
        count = info.base.num_hidden_layers
        if len(layers) != count or all(predictor is None for predictor in layers):
            raise ValueError(
                f"layers must have one entry for each of the base model's {count} layers, and not "
                f"only None; got {len(layers)} entries."
            )
        expected = {"hidden_size": info.base.hidden_size, "block_size": info.block_size}
        for layer, predictor in enumerate(layers):
            for key, value in expected.items():
                if predictor is not None and predictor.sizes[key] != value:
                    raise ValueError(
                        f"the predictor of layer {layer} has {key}="
                        f"{shown(predictor.sizes[key])}, expected {shown(value)}."
                    )
        # A ModuleList holds None as well, whatever its annotations say.
        self.networks = nn.ModuleList(cast(list[nn.Module], layers))

    @property
    def layers(self) -> list[BlockPredictor | None]:
        """One entry for each decoder layer; None for a layer without a predictor."""
        return cast(list[BlockPredictor | None], list(self.networks))

    @property
    def known(self) -> list[int]:
        """Indices of the layers that have a predictor."""
        return [i for i, network in enumerate(self.layers) if network is not None]

    @property
    def recommended(self) -> LeMoConfig:
        """A `LeMoConfig` that fits, with the default retention: layers agree on one kept set, which
        the first layer with a predictor chooses; the layers below it stay dense."""
        return LeMoConfig(
            policy="predictor",
            block_size=self.info.block_size,
            dense_first_layers=self.known[0],
        )

    def check(self, model: Any, lemo_config: LeMoConfig) -> None:
        """Check the model and the settings of a training against the predictors.

        Args:
            model: Transformers model. Other weights cause a warning.
            lemo_config: The user's settings.

        Raises:
            ValueError: The architecture or the block size differs.
        """
        self.info.base.check(BaseModel.of_model(model))
        self._check_settings(lemo_config)

    def _check_settings(self, lemo_config: LeMoConfig) -> None:
        theirs, ours = self.info.block_size, lemo_config.block_size
        if theirs != ours:
            raise ValueError(
                f"the predictors were trained with block_size={theirs}, the LeMoConfig has "
                f"block_size={ours}: set block_size={theirs}, or use predictors trained with it."
            )

    def with_recall(self, table: list[dict[str, Any]]) -> "LeMoPredictor":
        """A copy with the same networks and the given recall: rows of
        `lemo_hf.tune.recall.recall_table`."""
        return LeMoPredictor(dataclasses.replace(self.info, recall=table), self.layers)

    def same_as(self, other: "LeMoPredictor") -> bool:
        """Whether both have the same networks with the same weights, on any device."""
        ours, theirs = self.state_dict(), other.state_dict()
        return self._sizes() == other._sizes() and all(
            torch.equal(tensor.cpu(), theirs[name].cpu()) for name, tensor in ours.items()
        )

    def save_files(
        self, directory: str | os.PathLike, lemo_config: LeMoConfig | None = None
    ) -> None:
        """Write ``lemo_predictors.safetensors`` and ``lemo_config.json`` into a directory.

        Args:
            directory: Directory, made if missing. After a crash it holds the old or the new files.
            lemo_config: Settings to train with; None: `recommended`.

        Raises:
            ValueError: ``lemo_config`` has another block size.
        """
        lemo_config = self.recommended if lemo_config is None else lemo_config
        self._check_settings(lemo_config)
        info = {f.name: getattr(self.info, f.name) for f in dataclasses.fields(self.info)}
        section = {**info, "base": self.info.base.to_dict(), "layers": self._sizes()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        write_predictor_files(directory, lemo_config, section, tensors)

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        lemo_config: LeMoConfig | None = None,
        *,
        repo_id: str | None = None,
    ) -> None:
        """Write what `save_files` writes, and a model card ``README.md``, which replaces an earlier
        one of a predictor and nothing else.

        Args:
            directory: Directory, made if missing.
            lemo_config: Settings to train with; None: `recommended`.
            repo_id: Repository that the card tells users to load; None: the directory.

        Raises:
            ValueError: ``lemo_config`` has another block size.
        """
        self.save_files(directory, lemo_config)
        card = model_card(self.info, self.layers, repo_id or os.fspath(directory))
        write_card(os.path.join(directory, "README.md"), card)

    def push_to_hub(
        self,
        repo_id: str,
        lemo_config: LeMoConfig | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "LeMo predictor",
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit.

        Args:
            repo_id: Repository id; the repository is made if missing.
            lemo_config: Settings to train with; None: `recommended`.
            private: Whether a new repository is private.
            token: Access token that may write; None: the stored one.
            revision: Branch, which is made if missing; None: the default branch.
            commit_message: Message of the commit.

        Returns:
            The commit's URL.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, lemo_config, repo_id=repo_id)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                revision=revision,
                commit_message=commit_message,
            )
        return commit.commit_url

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike, **hub_kwargs: Any) -> "LeMoPredictor":
        """Load and check predictors from a directory or a Hub repository, on the CPU.

        Args:
            path_or_repo: Directory, or Hub repository id.
            **hub_kwargs: Arguments of `hf_hub_download`: ``revision``, ``token``, ``cache_dir``,
                ...

        Returns:
            Predictors in fp32 and eval mode, without gradients.

        Raises:
            OSError: There is no such directory or repository, or it cannot be reached.
            ValueError: A file is missing, damaged, pickled or of a newer version, or the two files
                do not belong together. Then nothing is loaded.
        """
        if not os.path.isdir(path_or_repo):
            return cls._from_files(
                *find_files(path_or_repo, [CONFIG_NAME, WEIGHTS_NAME], **hub_kwargs)
            )
        with locked(path_or_repo, shared=True):  # against a save that is under way
            return cls._from_files(*find_files(path_or_repo, [CONFIG_NAME, WEIGHTS_NAME]))

    @classmethod
    def _from_files(cls, config_path: str, weights_path: str) -> "LeMoPredictor":
        section = read_section(config_path)
        try:
            predictor = cls._on_meta(dict(section))
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else shortened(str(error))
            raise ValueError(
                f"{config_path}: the section 'predictor' is not one this version of lemo-hf can "
                f"use: {what}. pip install -U lemo-hf, or download it again (force_download=True)."
            ) from error
        shapes = {name: tuple(tensor.shape) for name, tensor in predictor.state_dict().items()}
        sha256 = section["sha256"]
        tensors = read_tensors(named_weights(weights_path, sha256), shapes, sha256)
        predictor.load_state_dict(tensors, assign=True)
        return predictor.eval().requires_grad_(False)

    @classmethod
    def _on_meta(cls, section: dict[str, Any]) -> "LeMoPredictor":
        """The networks that a section describes, without memory."""
        del section["format"], section["sha256"]
        sizes = section.pop("layers")
        info = PredictorInfo(**{**section, "base": BaseModel(**section["base"])})
        with torch.device("meta"):
            return cls(info, [_block_predictor(i, layer) for i, layer in enumerate(sizes)])

    def _sizes(self) -> list[dict[str, int] | None]:
        """The sizes of each layer's predictor."""
        return [None if network is None else network.sizes for network in self.layers]

    def describe(self) -> str:
        """A description of the predictors in one line."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        layers = ", ".join(map(str, self.known))
        return (
            f"predictors of layers {layers} of {len(self.layers)}, {parameters:,} parameters in "
            f"all, for {self.info.block_size}-token blocks of {self.info.base.name or 'a model'}"
        )


def _block_predictor(layer: int, sizes: dict[str, Any] | None) -> BlockPredictor | None:
    if sizes is None:
        return None
    try:
        return BlockPredictor(**sizes)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"layer {layer} has sizes {shown(sizes)}: {error}") from error


def _is_recall(row: Any) -> bool:
    """Whether it is a row of `lemo_hf.tune.recall.recall_table`."""
    if not isinstance(row, dict):
        return False
    texts = all(isinstance(row.get(name), str) for name in ("documents", "policy"))
    numbers = all(type(row.get(name)) in (int, float) for name in ("retention", "recall"))
    return texts and numbers and type(row.get("layer")) is int
