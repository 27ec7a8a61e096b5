"""`LeMoPredictor`: the learned predictors of one base model, in memory, in files and on the Hub."""

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from lemo_hf.config import LeMoConfig
from lemo_hf.files import CONFIG_NAME, WEIGHTS_NAME, find_files
from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.predictors.model_card import PLOT_NAME, model_card
from lemo_hf.predictors.predictor_files import read_section, read_tensors, write_predictor_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictorInfo:
    """What predictors were trained for, and how well they do; all of it JSON.

    Attributes:
        block_size: Tokens a block.
        normalize_scores: The targets were normalised, see `LeMoConfig`.
        base: The model they were trained for.
        recall: What was measured, as `lemo_hf.recall.recall_table` returns it.
        training: How they were made. ``"datasets"`` (Hub ids), ``"command"`` and ``"pruned"``
            (``{"attention": [share of units pruned, one a layer], "mlp": [...]}``) have places of
            their own in the model card; all else (tokens, epochs, ...) is listed there.

    Raises:
        ValueError: A size is no positive integer, or the flag no bool.
    """

    block_size: int
    normalize_scores: bool
    base: BaseModel
    recall: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(
                f"block_size must be an integer of at least 1, got {self.block_size!r}"
            )
        if type(self.normalize_scores) is not bool:
            raise ValueError(f"normalize_scores must be a bool, got {self.normalize_scores!r}")


class LeMoPredictor(nn.Module):
    """One small network a decoder layer and head, which says what blocks the layer needs.

    Args:
        info: What they were trained for.
        attention: One `BlockPredictor` a decoder layer; None for a layer that is to stay dense.
        mlp: The same for MLPs that choose for themselves (``mlp_retention``), or None.

    Raises:
        ValueError: There is not one entry a layer of the base model, no predictor at all, or one
            for other sizes than ``info`` says.
    """

    def __init__(
        self,
        info: PredictorInfo,
        attention: Sequence[BlockPredictor | None],
        mlp: Sequence[BlockPredictor | None] | None = None,
    ):
        super().__init__()
        self.info = info
        # A ModuleList holds None as well, whatever its annotations say.
        self.attention = nn.ModuleList(cast(list[nn.Module], attention))
        self.mlp = None if mlp is None else nn.ModuleList(cast(list[nn.Module], mlp))
        for name, head in self.heads.items():
            layers = info.base.num_hidden_layers
            if len(head) != layers or all(predictor is None for predictor in head):
                raise ValueError(
                    f"the {name} head needs an entry a layer (the base model has {layers}), None "
                    f"for those that stay dense but not for all; got {len(head)}."
                )
            expected = {
                "hidden_size": info.base.hidden_size,
                "block_size": info.block_size,
                "head": name,
            }
            for layer, predictor in enumerate(head):
                if predictor is None:
                    continue
                for key, value in expected.items():
                    if predictor.sizes[key] != value:
                        raise ValueError(
                            f"the {name} predictor of layer {layer} has "
                            f"{key}={predictor.sizes[key]!r}, expected {value!r}."
                        )

    @property
    def heads(self) -> dict[str, list[BlockPredictor | None]]:
        """The predictors of ``"attention"`` and, if there are such, ``"mlp"``."""
        heads = {"attention": self.attention, "mlp": self.mlp}
        return {
            name: cast(list[BlockPredictor | None], list(head))
            for name, head in heads.items()
            if head is not None
        }

    @property
    def recommended(self) -> LeMoConfig:
        """A `LeMoConfig` that fits, with the usual retention: layers agree on one kept set, which
        the first layer with a predictor chooses; those below it stay dense."""
        return LeMoConfig(
            policy="predictor",
            block_size=self.info.block_size,
            normalize_scores=self.info.normalize_scores,
            dense_first_layers=[network is not None for network in self.attention].index(True),
        )

    def check(self, model_config: Any, lemo_config: LeMoConfig) -> None:
        """Compare with the model and the settings that are to be trained with.

        Args:
            model_config: The model's transformers config. Another name or commit is a warning.
            lemo_config: The user's choice.

        Raises:
            ValueError: Architecture, block size or normalisation differ.
        """
        self.info.base.check(BaseModel.from_config(model_config))
        self._check_settings(lemo_config)

    def _check_settings(self, lemo_config: LeMoConfig) -> None:
        for name in ("block_size", "normalize_scores"):
            theirs, ours = getattr(self.info, name), getattr(lemo_config, name)
            if theirs != ours:
                raise ValueError(
                    f"the predictors were trained with {name}={theirs}, the LeMoConfig has "
                    f"{name}={ours}: set {name}={theirs}, or use predictors trained with {ours}."
                )

    def with_recall(self, table: list[dict[str, Any]]) -> "LeMoPredictor":
        """The same networks, knowing their recall: rows of `lemo_hf.recall.recall_table`."""
        info = dataclasses.replace(self.info, recall=table)
        return LeMoPredictor(info, **self.heads)

    def weak_layers(self, least: float, retention: float = 0.5) -> dict[str, list[int]]:
        """Layers whose recall was measured to be below ``least`` on some of the documents.

        Args:
            least: Share of the oracle's blocks.
            retention: At which recall was measured.

        Returns:
            Layers in ascending order, by head.

        Raises:
            ValueError: Recall was not measured at that retention.
        """
        measured = [row for row in self.info.recall if row["policy"] == "predictor"]
        known = sorted({row["retention"] for row in measured})
        weak = {}
        for head, networks in self.heads.items():
            rows = [r for r in measured if (r["head"], r["retention"]) == (head, retention)]
            if not rows:
                raise ValueError(
                    f"recall of the {head} predictors at retention {retention} was not measured "
                    f"(measured: {known}): run lemo_hf.recall.recall_table."
                )
            weak[head] = [
                i
                for i, network in enumerate(networks)
                if network is not None and min(row["layers"][i] for row in rows) < least
            ]
        return weak

    def without(self, layers: dict[str, list[int]]) -> "LeMoPredictor":
        """The same but for the predictors of some layers, which cannot choose blocks any more.

        Args:
            layers: By head, as `weak_layers` returns them.

        Raises:
            ValueError: Nothing would be left of a head.
        """
        heads = {
            name: [None if i in layers.get(name, ()) else network for i, network in enumerate(head)]
            for name, head in self.heads.items()
        }
        return LeMoPredictor(self.info, **heads)

    def same_as(self, other: "LeMoPredictor") -> bool:
        """Whether both hold the same networks with the same weights, wherever they lie."""
        ours, theirs = self.state_dict(), other.state_dict()
        return self._sizes() == other._sizes() and all(
            torch.equal(tensor.cpu(), theirs[name].cpu()) for name, tensor in ours.items()
        )

    def save_files(
        self, directory: str | os.PathLike, lemo_config: LeMoConfig | None = None
    ) -> None:
        """Write ``lemo_predictors.safetensors`` and ``lemo_config.json`` into a directory.

        Args:
            directory: Made if missing. After a crash it holds the old files or the new ones.
            lemo_config: To train with; `recommended` if None.

        Raises:
            ValueError: ``lemo_config`` has another block size or normalisation.
        """
        lemo_config = self.recommended if lemo_config is None else lemo_config
        self._check_settings(lemo_config)
        info = {f.name: getattr(self.info, f.name) for f in dataclasses.fields(self.info)}
        section = {**info, "base": self.info.base.to_dict(), **self._sizes()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        write_predictor_files(directory, lemo_config, section, tensors)

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        lemo_config: LeMoConfig | None = None,
        *,
        plot: str | os.PathLike | None = None,
        repo_id: str | None = None,
    ) -> None:
        """`save_files`, and a model card ``README.md``.

        Args:
            directory: Made if missing.
            lemo_config: To train with; `recommended` if None.
            plot: A PNG of the recall, copied to ``recall.png`` and shown in the card.
            repo_id: What the card tells users to load; the directory if None.

        Raises:
            ValueError: ``lemo_config`` has another block size or normalisation.
        """
        self.save_files(directory, lemo_config)
        place = os.path.join(directory, PLOT_NAME)
        if plot is not None and os.path.abspath(plot) != os.path.abspath(place):
            shutil.copyfile(plot, place)
        card = model_card(
            self.info, self.heads, repo_id or os.fspath(directory), plot=plot is not None
        )
        with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as file:
            file.write(card)

    def push_to_hub(
        self,
        repo_id: str,
        lemo_config: LeMoConfig | None = None,
        *,
        plot: str | os.PathLike | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "LeMo predictor",
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit.

        Args:
            repo_id: Repository, which is made if missing.
            lemo_config: To train with; `recommended` if None.
            plot: A PNG of the recall.
            private: Of a new repository.
            token: That may write; the stored one if None.
            revision: Branch, which is made if missing; None for the default one.
            commit_message: Of the commit.

        Returns:
            The commit's URL.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, lemo_config, plot=plot, repo_id=repo_id)
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
        """Load predictors from a directory or a Hub repository, checked, on the CPU.

        Args:
            path_or_repo: Directory, or repository id.
            **hub_kwargs: ``revision``, ``token``, ``cache_dir``, ... for `hf_hub_download`.

        Returns:
            Predictors in fp32 and eval mode that require no gradient.

        Raises:
            OSError: There is no such directory or repository, or it cannot be reached.
            ValueError: A file is missing, damaged, pickled, of a newer version, or the two do not
                belong together. Nothing is loaded then.
        """
        config_path, weights_path = find_files(
            path_or_repo, [CONFIG_NAME, WEIGHTS_NAME], **hub_kwargs
        )
        section = read_section(config_path)
        try:
            predictor = cls._on_meta(dict(section))
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{config_path}: the section 'predictor' is not one this version of lemo-hf can "
                f"use: {what}. pip install -U lemo-hf, or download it again (force_download=True)."
            ) from error
        shapes = {name: tuple(tensor.shape) for name, tensor in predictor.state_dict().items()}
        tensors = read_tensors(weights_path, shapes, section["sha256"])
        predictor.load_state_dict(tensors, assign=True)
        return predictor.eval().requires_grad_(False)

    @classmethod
    def _on_meta(cls, section: dict[str, Any]) -> "LeMoPredictor":
        """The networks that a section describes, without memory."""
        del section["format"], section["sha256"]
        heads = {name: section.pop(name) for name in ("attention", "mlp")}
        info = PredictorInfo(**{**section, "base": BaseModel(**section["base"])})
        with torch.device("meta"):
            for name, head in heads.items():
                if head is not None:
                    heads[name] = [_block_predictor(name, i, sizes) for i, sizes in enumerate(head)]
        return cls(info, **heads)

    def _sizes(self) -> dict[str, list[dict[str, Any] | None] | None]:
        """What each layer's predictor is made with, by head."""
        sizes = {
            name: [None if predictor is None else predictor.sizes for predictor in head]
            for name, head in self.heads.items()
        }
        return {"mlp": None, **sizes}

    def describe(self) -> str:
        """One line: what they are."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        count = sum(predictor is not None for predictor in self.attention)
        return (
            f"{count} of {len(self.attention)} layers have a predictor, "
            f"{'attention and MLP' if self.mlp else 'attention only'}, {parameters:,} parameters "
            f"in all, for {self.info.block_size}-token blocks of {self.info.base.name or 'a model'}"
        )


def _block_predictor(head: str, layer: int, sizes: dict[str, Any] | None) -> BlockPredictor | None:
    if sizes is None:
        return None
    try:
        return BlockPredictor(**sizes)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{head} of layer {layer} has sizes {sizes!r}: {error}") from error
