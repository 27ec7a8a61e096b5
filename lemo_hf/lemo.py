"""`LeMo`: what `apply_lemo` puts on a model. Trainers guide its passes and read its counts."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lemo_hf.config import LeMoConfig
from lemo_hf.core.attention import describe_attention
from lemo_hf.core.checks import check_predictors
from lemo_hf.core.family import Family
from lemo_hf.core.fp8_switch import Fp8Switch
from lemo_hf.core.layer import LayerSetup, make_sparse, make_stock
from lemo_hf.core.passes import Passes
from lemo_hf.describe import describe_batch, describe_offload, describe_run
from lemo_hf.kernels.launch import settle
from lemo_hf.load_predictor import load_predictor
from lemo_hf.memory.offload import HostMemory
from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.predictors.predictor_set import LeMoPredictor
from lemo_hf.schedule import is_late

logger = logging.getLogger(__name__)

IDLE = 0.95  # share of the tokens, from which on LeMo is said to do next to nothing


class LeMo:
    """LeMo on one model: its sparse layers, and counts of what its passes kept.

    Attributes:
        config: The user's settings.
        passes: Hooks and counts of the forward passes.
        rules: What attention and MLP of each layer keep; None for a dense layer.
        predictor: The `LeMoPredictor` in use, or None.
        asks: Whether labels cover only a part of each row, and not all of it; None: not known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: LeMoConfig,
        family: Family,
        predictors: LeMoPredictor | Sequence[BlockPredictor | None] | None,
    ):
        layers = cast(nn.ModuleList, model.get_submodule(family.layers))
        rules, levels = config.layer_rules(len(layers)), config.recompute_levels(len(layers))
        if predictors is None and config.predictor is not None:
            predictors = load_predictor(config, BaseModel.of_model(model))
        self.predictor: LeMoPredictor | None = None
        self.asks: bool | None = None
        if isinstance(predictors, LeMoPredictor):
            predictors.check(model, config)
            self.predictor = predictors
            predictors = predictors.layers
        check_predictors(config, predictors, rules)
        self.config, self.rules, self._warned = config, rules, False
        self._layers = list(layers)
        fp8 = Fp8Switch(self._layers) if config.fp8 else None
        host = None
        if config.offload_gib is not None:
            host = HostMemory(config.offload_gib, last=len(layers) - 1)
        last = layers[self.sparse_layers[-1]]
        self.passes = Passes(model, config, family, last, host, fp8)
        for i, level in enumerate(levels):
            rule, mlp_rule = rules[i] or (None, None)
            setup = LayerSetup(
                family=family.of_layer(layers[i]),
                index=i,
                rule=rule,
                mlp_rule=mlp_rule,
                closes=i + 1 == len(layers),
                recompute=level,
                predictor=None if predictors is None else predictors[i],
                passes=self.passes,
            )
            make_sparse(layers[i], setup)

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers that leave tokens out."""
        return [i for i, rules in enumerate(self.rules) if rules is not None]

    def remove(self) -> None:
        """Undo everything but the attribute that `remove_lemo` deletes."""
        self.passes.remove()
        if self.passes.fp8 is not None:
            self.passes.fp8.remove()
            self.passes.fp8 = None  # a trainer may still end its finish
        make_stock(self._layers)

    def describe(self) -> str:
        """One line: what is sparse and what stays dense."""
        predictor = None if self.predictor is None else self.predictor.describe()
        attention = self._attention()
        why = settle(next(self._layers[0].parameters()).device.type)
        if why is not None:
            attention += f"; PyTorch's operators in place of Triton's kernels ({why})"
        return describe_run(self.config, self.rules, attention, predictor, self.asks)

    def take_first_batch(self) -> str | None:
        """One line on what the first sparse pass kept. None before that pass, and after the first
        call that returned it."""
        first, self.passes.tally.first = self.passes.tally.first, None
        if first is None:
            return None
        return describe_batch(self.config, *first) + describe_offload(self.config, self._layers)

    def _attention(self) -> str:
        name = self.passes.family.attention
        found = (getattr(layer, name, None) for layer in self._layers)
        attention = next((x for x in found if x is not None), None)
        if attention is None:  # a hybrid that has none
            return "no attention"
        name = describe_attention(attention)
        if self.passes.family.recurrent is None:
            return name
        return f"{name}, recurrent layers on kept tokens as one shorter sequence"

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within this context passes are sparse: a trainer trains."""
        before, self.passes.resting = self.passes.resting, False
        try:
            with self.passes.said_what_helps():
                yield
        finally:
            self.passes.resting = before
            self.passes.drop()  # labels that were promised to a pass that never came

    def begin_step(self, step: int, steps: int | None = None) -> None:
        """Tell LeMo which optimizer step comes, as trainers do. From now on passes without labels
        are sparse too.

        Args:
            step: Optimizer steps done.
            steps: Optimizer steps of the whole run, at least one in its finish; None: no finish.
        """
        ends = is_late(self.config.finish, step, steps)
        self.passes.global_step, self.passes.asked, self.passes.told = step, True, True
        self.set_finish(self.config.finish_retention if ends else None)
        self.set_fp8(not is_late(self.config.bf16_finish, step, steps))

    def set_finish(self, retention: float | None) -> None:
        """Set the share of the blocks that rows keep in the finish; None outside the finish."""
        self.passes.retention = retention

    def set_fp8(self, on: bool) -> None:
        """Turn products that may be in FP8 to FP8, with new copies after bf16; or to bf16."""
        if self.passes.fp8 is not None:
            self.passes.fp8.turn(on)
            self.passes.in_fp8 = on

    def end_run(self) -> None:
        """End a run: passes that come now are no part of its finish."""
        self.set_finish(None)
        for on in (False, True):  # the next run has copies of the weights as they are then
            self.set_fp8(on)

    def end_step(self) -> None:
        """End the step: passes without labels are those of the plain model again."""
        self.passes.asked, self.passes.announced.for_step = False, None

    def report(self) -> dict[str, float]:
        """What passes kept since the counts were reset; empty if there was no sparse pass.

        Returns:
            ``attention_retention`` and ``mlp_retention``: kept tokens / tokens, summed over **all**
            layers; ``kept_tokens``: tokens that the average sublayer kept.
        """
        real = int(self.passes.tally.counts["real"])
        if not real:
            return {}
        total = len(self.rules)
        dense = total - len(self.sparse_layers)
        attention, mlp = (
            (int(self.passes.tally.counts[name]) / real + dense) / total
            for name in ("attention", "mlp")
        )
        return {
            "attention_retention": attention,
            "mlp_retention": mlp,
            "kept_tokens": real * (attention + mlp) / 2,
        }

    def take_figures(self, seconds: float) -> dict[str, float]:
        """Figures for a training log of the passes since the last call; counts start anew.

        Args:
            seconds: Time that these passes took, seconds.

        Returns:
            Retention, tokens of the rows, kept tokens a second and, with CUDA, peak memory in GiB,
            under names that start with ``lemo/``; empty if there was no sparse pass.
        """
        report, tokens = self.report(), int(self.passes.tally.counts["real"])
        self.passes.tally.reset()
        if not report:
            return {}
        self._warn_if_idle(report["attention_retention"])
        figures = {
            "lemo/attention_retention": report["attention_retention"],
            "lemo/mlp_retention": report["mlp_retention"],
            "lemo/tokens": tokens,
            "lemo/kept_tokens_per_second": report["kept_tokens"] / seconds,
        }
        if torch.cuda.is_available():
            figures["lemo/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return figures

    def _warn_if_idle(self, kept: float) -> None:
        """Warn once if rows leave next to nothing out, though the config asks for it."""
        asked, finish = self.config.retention, self.passes.retention is not None
        if self._warned or finish or not isinstance(asked, int | float) or asked > IDLE - 0.05:
            return
        if kept >= IDLE:
            self._warned = True
            logger.warning(
                "rows keep %.0f%% of their tokens, and retention=%g was asked for: the rows are "
                "too short, or have labels in too many blocks, to leave out more. Set a block_size "
                "below %d, or train without LeMo, which is as good here. This is said once.",
                *(100 * kept, asked, self.config.block_size),
            )

    def save_files(self, directory: str | os.PathLike) -> None:
        """Write ``lemo_config.json``, and the predictor if there is one, into ``directory``."""
        if self.predictor is None:
            self.config.save_pretrained(directory, replace_predictor=True)
        else:
            self.predictor.save_files(directory, self.config)
