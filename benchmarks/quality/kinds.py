"""Ways of training that `LeMoConfig` does not know, for comparison; each lasts as long as its with.

What is here measures quality. None of it saves what a full implementation would save: nested sets
are gathered from the whole stream, and a subset's gradients are cut out of dense ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.s2_attention import NAME, register
from lemo_hf import LeMoConfig
from lemo_hf.checks import check_model
from lemo_hf.config import KeepRule
from lemo_hf.families import Family
from lemo_hf.passes import Labels
from lemo_hf.patch import transformers_model
from lemo_hf.policies import POLICIES, ScoreInputs
from lemo_hf.step import Step


@contextmanager
def s2_attention(model: nn.Module) -> Iterator[None]:
    """LongLoRA's shifted sparse attention; full attention afterwards."""
    register()
    inner = transformers_model(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


@contextmanager
def nested_sets() -> Iterator[None]:
    """A layer keeps only blocks that the layer before it kept: what is dropped stays dropped.

    Needs a set for each layer and retentions that do not rise. Policies still see the whole stream;
    blocks that were dropped are what they were when they were.
    """
    wrapped = {name: partial(_nested, policy) for name, policy in POLICIES.items()}
    with mock.patch.dict(POLICIES, wrapped):
        yield


def _nested(policy: Callable[[ScoreInputs], Tensor], inputs: ScoreInputs) -> Tensor:
    scores = policy(inputs)
    chosen = [
        blocks
        for (layer, sublayer), blocks in inputs.step.kept_blocks.items()
        if sublayer == inputs.sublayer and layer < inputs.layer_index
    ]
    return scores.masked_fill(~chosen[-1], -1) if chosen else scores  # scores are at least 0


@contextmanager
def subset_gradients(model: nn.Module, config: LeMoConfig) -> Iterator[None]:
    """Training passes compute what a dense pass does; gradients flow through kept tokens alone.

    The kept blocks are those that LeMo would choose at its first layer for all. The other tokens
    have no loss, and no projection's output for them has a gradient, so that a backward would need
    nothing of theirs but the keys and values that others read.
    """
    inner = transformers_model(model)
    family = check_model(inner)
    layers = inner.get_submodule(family.layers)
    rules = [rules for rules in config.layer_rules(len(layers)) if rules is not None]
    now = _SubsetPass(config, family, rules[0][0])
    hooks = [
        inner.register_forward_pre_hook(now.begin, with_kwargs=True),
        inner.register_forward_hook(now.end, always_call=True),
        layers[0].register_forward_pre_hook(now.choose, with_kwargs=True),
    ]
    for layer in layers:
        parts = [getattr(layer, family.attention), *(getattr(layer, part) for part in family.mlp)]
        projections = [module for part in parts for module in part.children() if _is_linear(module)]
        hooks += [module.register_forward_hook(now.cut) for module in projections]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")  # PEFT's around one


class _SubsetPass:
    """The pass under way: its batch, its labels, and once chosen its kept tokens ``[B, T]``."""

    def __init__(self, config: LeMoConfig, family: Family, rule: KeepRule):
        self.config, self.family, self.rule = config, family, rule
        self.steps_done = 0
        self.step: Step | None = None
        self.kept: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple, kwargs: dict):
        if not model.training:
            return args, kwargs
        ids = kwargs["input_ids"]
        self.labels = Labels.in_call(kwargs)
        kwargs[self.labels.name] = self.labels.tensor
        if self.labels.num_items is not None:
            kwargs["num_items_in_batch"] = self.labels.num_items
        self.step = Step(
            self.config,
            tuple(ids.shape),
            ids.device,
            input_ids=ids,
            targets=self.labels.targets(),
            global_step=self.steps_done,
        )
        self.steps_done += 1
        return args, kwargs

    def choose(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.step is None:
            return
        x = args[0] if args else kwargs["hidden_states"]
        inputs = ScoreInputs(
            layer=layer,
            family=self.family,
            layer_index=0,
            sublayer="attention",
            x=x.detach(),
            position_embeddings=kwargs.get("position_embeddings"),
            step=self.step,
            predictor=None,
        )
        with torch.no_grad():
            chosen = self.step.choose(
                0, "attention", self.rule, lambda: POLICIES[self.config.policy](inputs), shared=True
            )
        tokens = chosen.blocks.repeat_interleave(self.config.block_size, 1)
        self.kept = tokens[:, : x.shape[1]]
        self.labels.strike(self.step)

    def cut(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.kept is None:
            return None
        return torch.where(self.kept[..., None], output, output.detach())

    def end(self, *_) -> None:
        self.step = self.kept = None
