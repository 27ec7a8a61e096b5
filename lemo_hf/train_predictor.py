"""Train predictors for a model: one dense pass a batch, one step of every layer's predictor in it.

Each layer's predictor learns while the frozen model runs, from the stream it is about to read and
the oracle's scores of it. So nothing is kept of a batch, neither hidden states nor scores, and
documents may be fresh at every step.

Source: LeMo, arXiv:2501.09767, "Context-aware Pattern Prediction".
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lemo_hf.checks import check_intermediate, check_model
from lemo_hf.config import LeMoConfig
from lemo_hf.files import whole_file
from lemo_hf.modes import evaluating
from lemo_hf.observe import observe
from lemo_hf.patch import transformers_model
from lemo_hf.policies import POLICIES, ScoreInputs, sublayer_input
from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.predictors.fit import Fit
from lemo_hf.predictors.predictor_set import LeMoPredictor, PredictorInfo

# Shares of the training after which rarely firing units are pruned.
PRUNE_AT = (0.4, 0.55, 0.7)
WARMUP = 0.05
STATE = "training_state"


@dataclass(frozen=True)
class PredictorTraining:
    """How predictors are trained.

    Args:
        block_size: Tokens a block.
        heads: ``("attention",)``, or with ``"mlp"`` for MLPs that choose for themselves.
        units: ReLU units of each layer at the start; pruning leaves fewer.
        rank: Size of the predicted queries and keys.
        normalize_scores: Learn the oracle's normalised scores, see `LeMoConfig`.
        causal: A block's score depends on itself and what came before.
        loss: ``"ranking"``, ``"regression"`` (the paper's) or ``"distillation"``.
        epochs: Passes over the rows.
        batch_size: Rows a step on each device.
        learning_rate: At its peak; a cosine leads down to 0.
        rarely: A unit that fires on less than this share of the tokens is pruned; 0: none.
        seed: Of the initial weights and the order of the rows.
    """

    block_size: int = 64
    heads: tuple[str, ...] = ("attention",)
    units: int = 128
    rank: int = 32
    normalize_scores: bool = False
    causal: bool = False
    loss: str = "ranking"
    epochs: int = 1
    batch_size: int = 1
    learning_rate: float = 2e-3
    rarely: float = 0.1
    seed: int = 0

    @property
    def lemo_config(self) -> LeMoConfig:
        """What the oracle needs to know."""
        mlp = 0.5 if "mlp" in self.heads else None
        return LeMoConfig(
            policy="oracle",
            block_size=self.block_size,
            normalize_scores=self.normalize_scores,
            mlp_retention=mlp,
        )


def train_predictor(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    training: PredictorTraining | None = None,
    *,
    output_dir: str | os.PathLike | None = None,
    save_steps: int = 500,
    provenance: dict[str, Any] | None = None,
) -> LeMoPredictor:
    """Predictors of every layer of ``model``, fitted to the oracle's scores on ``rows``.

    Several processes (``accelerate launch``) share the rows and average gradients.

    Args:
        model: A causal LM of a supported family on its device. Frozen, left as it was.
        rows: Token ids, all rows of one length, without padding.
        training: How.
        output_dir: Where the state is written every ``save_steps`` steps, and read if it is
            there: an interrupted training goes on to the very result it would have had.
        save_steps: Steps between two states.
        provenance: More facts for the model card: ``datasets``, ``command``.

    Returns:
        The predictors, on the model's device, in fp32.

    Raises:
        ValueError: Rows of several lengths, fewer rows than a step needs, rows of one block, or a
            state of another training in ``output_dir``.
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
            for step in range(done, run.steps):
                losses = run.step(step)
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{losses.mean().item():.3f}")
                if state is not None and (step + 1) % save_steps == 0 and main:
                    run.save(state, step + 1)
    finally:
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.requires_grad_(grad)
    return run.result(provenance or {})


class _Run:
    """Fits of all layers, and the rows they learn from in a fixed order."""

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[Sequence[int]], how: PredictorTraining
    ):
        family = check_model(model)
        self.model, self.rows, self.how = model, rows, how
        self.config = how.lemo_config
        check_intermediate(self.config, family, model.config.model_type)
        self.state = PartialState()
        self.device = next(model.parameters()).device
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise ValueError(f"rows must be of one length, got lengths {sorted(lengths)[:5]}.")
        self.tokens = lengths.pop()
        if self.tokens < 2 * how.block_size:
            raise ValueError(
                f"rows of {self.tokens} tokens hold fewer than two blocks of {how.block_size}: "
                "use longer rows or a smaller block_size."
            )
        self.per_step = how.batch_size * self.state.num_processes
        if len(rows) < self.per_step:
            raise ValueError(
                f"{len(rows)} rows are fewer than one step takes ({self.per_step}: batch_size="
                f"{how.batch_size} on each of {self.state.num_processes} processes)."
            )
        self.epoch_steps = len(rows) // self.per_step
        self.steps = self.epoch_steps * how.epochs
        generator = torch.Generator().manual_seed(how.seed)
        self.fits: dict[tuple[str, int], Fit] = {}
        for head in how.heads:
            for layer in range(len(cast(nn.ModuleList, model.get_submodule(family.layers)))):
                self._add(head, layer, how.units, generator)

    def _add(self, head: str, layer: int, units: int, generator: torch.Generator) -> None:
        how = self.how
        predictor = BlockPredictor(
            self.model.config.hidden_size,
            how.block_size,
            units=units,
            rank=how.rank if head == "attention" else 1,
            head=head,
            causal=how.causal,
            normalize=how.normalize_scores,
            longest=-(-self.tokens // how.block_size),
        )
        predictor.init_weights(generator)
        self.fits[head, layer] = Fit(predictor.to(self.device), how.learning_rate, how.loss)

    def step(self, step: int) -> torch.Tensor:
        """Step number ``step`` of all; the losses."""
        batch = torch.stack([torch.as_tensor(self.rows[i]) for i in self._batch(step)]).long()
        losses: list[torch.Tensor] = []

        def see(inputs: ScoreInputs) -> None:
            target = POLICIES["oracle"](inputs)
            fit = self.fits[inputs.sublayer, inputs.layer_index]
            rows = sublayer_input(inputs, inputs.x)
            with torch.enable_grad():
                losses.append(fit.backward(rows, target))

        observe(self.model, self.config, batch.to(self.device), see, sublayers=self.how.heads)
        self._average_gradients()
        lr = self._learning_rate(step)
        for fit in self.fits.values():
            fit.step(lr)
        if self.how.rarely and step + 1 in [round(self.steps * share) for share in PRUNE_AT]:
            for fit in self.fits.values():
                fit.fired = reduce(fit.fired, "sum")
                fit.seen *= self.state.num_processes
                fit.prune(self.how.rarely)
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
        parameters = [p for fit in self.fits.values() for p in fit.predictor.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))

    def _learning_rate(self, step: int) -> float:
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return self.how.learning_rate * (step + 1) / warmup
        share = (step - warmup) / max(1, self.steps - warmup)
        return self.how.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def save(self, folder: Path, done: int) -> None:
        """Write weights, moments and counts; the last state is replaced when this one is whole."""
        tensors, seen = {}, {}
        for (head, layer), fit in self.fits.items():
            name = f"{head}.{layer}"
            seen[name] = fit.seen
            tensors[f"{name}.fired"] = fit.fired
            for key, parameter in fit.predictor.named_parameters():
                tensors[f"{name}.{key}"] = parameter.detach()
                for moment, value in fit.optimizer.state[parameter].items():
                    tensors[f"{name}.{key}.{moment}"] = value
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"done": done, "seen": seen, "rows": len(self.rows), "tokens": self.tokens}
        facts |= {"training": dataclasses.asdict(self.how)}
        metadata = {"format": "pt", "state": json.dumps(facts)}
        with whole_file(folder / "state.safetensors") as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata=metadata)

    def load(self, folder: Path) -> int:
        """Take up a state that `save` wrote; steps done, 0 if there is none."""
        path = folder / "state.safetensors"
        if not path.is_file():
            return 0
        with safe_open(path, "pt", device=str(self.device)) as file:
            facts = json.loads(file.metadata()["state"])
            ours = {"rows": len(self.rows), "tokens": self.tokens}
            ours |= {"training": json.loads(json.dumps(dataclasses.asdict(self.how)))}
            changed = [key for key, value in ours.items() if facts[key] != value]
            if changed:
                raise ValueError(
                    f"{path} is of a training with other {', '.join(changed)}: "
                    f"{[facts[key] for key in changed]}, now {[ours[key] for key in changed]}. "
                    "Use another output_dir, or delete it to start anew."
                )
            for head, layer in list(self.fits):
                name = f"{head}.{layer}"
                fired = file.get_tensor(f"{name}.fired")
                self._add(head, layer, len(fired), torch.Generator())
                fit = self.fits[head, layer]
                fit.fired, fit.seen = fired, facts["seen"][name]
                for key, parameter in fit.predictor.named_parameters():
                    parameter.data.copy_(file.get_tensor(f"{name}.{key}"))
                    fit.optimizer.state[parameter] = {
                        moment: file.get_tensor(f"{name}.{key}.{moment}")
                        for moment in ("step", "exp_avg", "exp_avg_sq")
                    }
        return facts["done"]

    def result(self, provenance: dict[str, Any]) -> LeMoPredictor:
        """The predictors as they are now."""
        how = self.how
        layers: dict[str, list[BlockPredictor]] = {head: [] for head in how.heads}
        pruned: dict[str, list[float]] = {head: [] for head in how.heads}
        for (head, _), fit in self.fits.items():
            layers[head].append(fit.predictor.requires_grad_(False).eval())
            pruned[head].append(round(1 - fit.predictor.units / how.units, 4))
        info = PredictorInfo(
            block_size=how.block_size,
            normalize_scores=how.normalize_scores,
            base=BaseModel.from_config(self.model.config),
            training={
                **dataclasses.asdict(how),
                "rows": len(self.rows),
                "tokens_a_row": self.tokens,
                "pruned": pruned,
                **provenance,
            },
        )
        return LeMoPredictor(info, layers.get("attention", []), layers.get("mlp"))
