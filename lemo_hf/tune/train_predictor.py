"""Predictors for a model, made and trained: one dense pass for each batch, then a step of each
predictor.

A predictor learns, from the stream that its layer is about to read, what asking blocks attend to in
the upper half of the model (`LookedAt`). Nothing of a batch is stored.

Source: LeMo, arXiv:2501.09767, "Context-aware Pattern Prediction".
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lemo_hf.config import LeMoConfig
from lemo_hf.core.checks import check_model
from lemo_hf.eval.weights import model_checksum
from lemo_hf.modes import evaluating
from lemo_hf.patch import transformers_model
from lemo_hf.predictors.asked_shares import HIDDEN
from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.block_predictor import RANK, BlockPredictor
from lemo_hf.predictors.predictor_set import LeMoPredictor, PredictorInfo
from lemo_hf.storage.files import whole_file
from lemo_hf.tune.looked_at import LookedAt, Row, collate, length

logger = logging.getLogger(__name__)

WARMUP = 0.05
MIDDLE = 0.4  # of the depth
STATE = "training_state"


@dataclass(frozen=True)
class PredictorTraining:
    """Settings of the training of predictors.

    Args:
        layers: Layers that get a predictor; None: the one at `MIDDLE` of the depth, where states
            tell meanings. If layers agree, the first sparse one chooses for all, and those below
            are dense.
        block_size: Tokens a block.
        rank: Size of a token's query and key; at most the model's hidden size.
        asking: Greatest number of asking blocks of a row, drawn anew at each step.
        epochs: Passes over the rows. 0 leaves the networks as they begin: tokens look for similar
            tokens, which finds more of what answers need than any training did
            (docs/predictors.md).
        batch_size: Number of rows in a step on each device.
        learning_rate: Learning rate at its peak; a cosine leads down to 0.
        seed: Seed of the initial weights, the order of the rows, and the asking blocks.
    """

    layers: tuple[int, ...] | None = None
    block_size: int = 64
    rank: int = RANK
    asking: int = 32
    epochs: int = 0
    batch_size: int = 1
    learning_rate: float = 3e-4
    seed: int = 0

    def of_model(self, num_layers: int) -> tuple[int, ...]:
        """The layers that get a predictor.

        Raises:
            ValueError: The model has no such layer.
        """
        if self.layers is None:
            return (round(MIDDLE * num_layers),)
        if not self.layers or not all(0 <= i < num_layers for i in self.layers):
            raise ValueError(f"layers={self.layers}: the model has layers 0 to {num_layers - 1}.")
        return tuple(sorted(set(self.layers)))


def train_predictor(
    model: nn.Module,
    rows: Sequence[Row],
    training: PredictorTraining | None = None,
    *,
    output_dir: str | os.PathLike | None = None,
    save_steps: int = 500,
    provenance: dict[str, Any] | None = None,
) -> LeMoPredictor:
    """Make predictors of some layers of ``model``, and train them on its attention over ``rows``.

    Several processes (``accelerate launch``) share the rows and average gradients.

    Args:
        model: Causal LM of a supported family, on its device; frozen, and unchanged afterwards.
        rows: Token ids, or mappings with ``input_ids`` and ``labels`` (-100: none). Rows of a batch
            may differ in length.
        training: Settings of the training; None: the defaults.
        output_dir: Directory for the state, written every ``save_steps`` steps and at the end. An
            interrupted training continues from it, with the same result. `remove_state` removes it.
        save_steps: Number of steps between two states.
        provenance: Further facts for the model card: ``datasets``, ``command``.

    Returns:
        The predictors, on the model's device, in fp32.

    Raises:
        ValueError: Fewer rows than a step needs, rows of fewer than three blocks, or in
            ``output_dir`` the state of another training that has not ended.
    """
    training = training or PredictorTraining()
    model = transformers_model(model)
    run = _Run(model, rows, training)
    state = None if output_dir is None else Path(output_dir) / STATE
    done = 0 if state is None else run.load(state)
    main = PartialState().is_main_process
    grads = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with (
            evaluating(model),
            tqdm(
                total=run.steps, initial=done, desc="predictors", unit="step", disable=not main
            ) as bar,
        ):
            if done == 0:
                run.center()
            for step in range(done, run.steps):
                losses = run.step(step)
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{losses.mean().item():.3f}")
                ends = step + 1 == run.steps
                if state is not None and main and (ends or (step + 1) % save_steps == 0):
                    run.save(state, step + 1)
    finally:
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.requires_grad_(grad)
    return run.result(provenance or {})


def remove_state(output_dir: str | os.PathLike) -> None:
    """Remove the state of `train_predictor`, whose result is saved."""
    shutil.rmtree(Path(output_dir) / STATE, ignore_errors=True)


def share_loss(log_shares: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of predicted shares, over the blocks that the predictor may look at.

    Shares that the target gives to other blocks (the asking block itself, the first) are left out:
    an asking block counts by what it gives elsewhere. All rows count the same.

    Args:
        log_shares: Logarithms of predicted shares, ``[B, M, N]``, about `HIDDEN` where a block is
            not seen.
        target: Shares to learn, ``[B, M, N]``.
    """
    target = target.masked_fill(log_shares <= HIDDEN / 2, 0)
    return -((target * log_shares).sum((1, 2)) / target.sum((1, 2)).clamp_min(1e-6)).mean()


class _Run:
    """Predictors of some layers, their optimizer, and the rows they learn from in a fixed order."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], how: PredictorTraining):
        family = check_model(model)
        self.model, self.rows, self.how = model, rows, how
        self.config = LeMoConfig(policy="oracle", block_size=how.block_size)
        self.state = PartialState()
        self.device = next(model.parameters()).device
        lengths = [length(row) for row in rows]
        self.tokens = sum(lengths)
        self.per_step = how.batch_size * self.state.num_processes
        if len(rows) < self.per_step:
            raise ValueError(
                f"{len(rows)} rows are fewer than one step takes ({self.per_step}: batch_size="
                f"{how.batch_size} on each of {self.state.num_processes} processes)."
            )
        if min(lengths) <= 2 * how.block_size:
            raise ValueError(
                f"a row of {min(lengths)} tokens holds fewer than three blocks of "
                f"{how.block_size}: use longer rows or a smaller block_size."
            )
        self.epoch_steps = len(rows) // self.per_step
        self.steps = self.epoch_steps * how.epochs
        generator = torch.Generator().manual_seed(how.seed)
        self.depth = len(cast(nn.ModuleList, model.get_submodule(family.layers)))
        self.networks = nn.ModuleDict()
        for layer in how.of_model(self.depth):
            hidden = model.config.get_text_config().hidden_size
            network = BlockPredictor(hidden, how.block_size, min(how.rank, hidden))
            network.init_weights(generator)
            self.networks[str(layer)] = network
        self.networks.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.networks.parameters(), weight_decay=0.01, fused=self.device.type == "cuda"
        )

    def center(self) -> None:
        """Remove what the tokens of one row have in common from queries and keys."""
        batch = collate(self.rows[:1], self.device)
        layers = [int(name) for name in self.networks]
        seen = LookedAt(self.model, self.config, batch, layers, 1)
        for layer, module in zip(layers, self.networks.values(), strict=True):
            cast(BlockPredictor, module).center(seen.rows(layer))

    def step(self, step: int) -> Tensor:
        """Take step number ``step`` with all networks. Returns the losses."""
        size, process = self.how.batch_size, self.state.process_index
        first = (self.how.seed << 32) + step * self.per_step + process * size
        batch = collate([self.rows[i] for i in self._batch(step)], self.device)
        layers = [int(name) for name in self.networks]
        seeds = range(first, first + size)
        seen = LookedAt(self.model, self.config, batch, layers, self.how.asking, seeds)
        mask = batch["attention_mask"]
        losses = []
        for layer, module in zip(layers, self.networks.values(), strict=True):
            network = cast(BlockPredictor, module)
            projected = network.project(seen.rows(layer), None if mask is None else mask.bool())
            projected = projected.weighed(seen.rare)
            shares = torch.cat(list(network.log_shares(projected, seen.index, seen.asks)), 1)
            loss = share_loss(shares, seen.target)
            loss.backward()
            losses.append(loss.detach())
        self._average_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses)

    def _batch(self, step: int) -> list[int]:
        """Rows of this process in a step; an epoch is a shuffle of all rows."""
        epoch, place = divmod(step, self.epoch_steps)
        generator = torch.Generator().manual_seed(self.how.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        start = place * self.per_step + self.state.process_index * self.how.batch_size
        return order[start : start + self.how.batch_size].tolist()

    def _average_gradients(self) -> None:
        if self.state.num_processes == 1:
            return
        gradients = [p.grad for p in self.networks.parameters() if p.grad is not None]
        flat = reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _learning_rate(self, step: int) -> float:
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return self.how.learning_rate * (step + 1) / warmup
        share = (step - warmup) / max(1, self.steps - warmup)
        return self.how.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        """Facts that decide the result; a state is used only if all of them are the same."""
        how = json.loads(json.dumps(dataclasses.asdict(self.how)))
        return {
            "rows": len(self.rows),
            "tokens": self.tokens,
            "training": how,
            "dataset": _checksum(self.rows),
            "model": model_checksum(self.model),
            "processes": self.state.num_processes,
        }

    def save(self, folder: Path, done: int) -> None:
        """Write weights and moments; the last state is replaced when this one is whole."""
        tensors = {}
        for name, parameter in self.networks.named_parameters():
            tensors[name] = parameter.detach()
            for moment, value in self.optimizer.state[parameter].items():
                tensors[f"{name}.{moment}"] = value
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"done": done, "steps": self.steps, **self._facts}
        metadata = {"format": "pt", "state": json.dumps(facts)}
        with whole_file(folder / "state.safetensors") as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata=metadata)

    def load(self, folder: Path) -> int:
        """Load a state that `save` wrote. Returns the steps done, 0 without a state."""
        path = folder / "state.safetensors"
        if not path.is_file():
            return 0
        again = "Use another output_dir, or delete it to start anew."
        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                facts = json.loads(file.metadata()["state"])
                changed = [key for key, value in self._facts.items() if facts.get(key) != value]
                if not changed:
                    self._take(file)
                    return facts["done"]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). {again}") from error
        told = ", ".join(
            f"{key} was {facts.get(key)!r} and is {self._facts[key]!r}" for key in changed
        )
        if facts["done"] == facts.get("steps"):
            logger.warning(
                "%s belongs to another training, which has ended (%s): starting anew.", path, told
            )
            return 0
        raise ValueError(
            f"{path} belongs to a training with other {', '.join(changed)}: {told}. {again}"
        )

    def _take(self, file: Any) -> None:
        """Take the weights and moments of a state."""
        for name, parameter in self.networks.named_parameters():
            parameter.data.copy_(file.get_tensor(name))
            self.optimizer.state[parameter] = {
                moment: file.get_tensor(f"{name}.{moment}")
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }

    def result(self, provenance: dict[str, Any]) -> LeMoPredictor:
        """The predictors as they are now."""
        how = self.how
        networks = self.networks.requires_grad_(False).eval()
        facts = {**dataclasses.asdict(how), "rows": len(self.rows), "tokens": self.tokens}
        base = BaseModel.of_model(self.model)
        info = PredictorInfo(how.block_size, base, training={**facts, **provenance})
        layers = [dict(networks).get(str(i)) for i in range(self.depth)]
        return LeMoPredictor(info, cast(list[BlockPredictor | None], layers))


def _checksum(rows: Sequence[Row]) -> str:
    """16 hexadecimal digits of the tokens and labels of all rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        parts = (row["input_ids"], row.get("labels")) if isinstance(row, Mapping) else (row, None)
        for part in parts:
            ids = None if part is None else torch.as_tensor(part).long().cpu()
            digest.update(
                b"none" if ids is None else f"{len(ids)} ".encode() + ids.numpy().tobytes()
            )
    return digest.hexdigest()[:16]
