"""Measurements of a live model for calibration: the loss that sparse passes cost, and saved
bytes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo_hf.config import LeMoConfig
from lemo_hf.core.checks import check_model
from lemo_hf.core.families import family_of
from lemo_hf.core.loss import shifted, supervised
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.lemo import LeMo
from lemo_hf.modes import evaluating
from lemo_hf.patch import apply_lemo, input_device, remove_lemo, transformers_model

Row = Mapping[str, Any]
SEGMENT = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Measurement:
    """Results of sparse passes over the calibration rows.

    Attributes:
        loss_rise: Loss above the dense model's on the same labels, nats per label.
        retentions: Share of the blocks that each layer's attention kept; 1 for dense layers.
    """

    loss_rise: float
    retentions: tuple[float, ...]


class LossRise:
    """Measures how much the loss of one model rises on the same rows, for one `LeMoConfig` after
    the other.

    Only labels that count under a config are measured (see ``supervise``), each against the dense
    model's loss on the same token: configs that keep different tokens have different labels, some
    easier than others, so their losses do not compare. Dropout is off, no gradient is stored, and
    the model is unchanged afterwards.

    Args:
        model: Causal LM or a PEFT model around one, without LeMo on it.
        rows: Rows, ``{"input_ids": [T], "labels": [T]}`` without padding, run one at a time;
            missing labels are the ids.
        predictors: Predictors as for `apply_lemo`.

    Attributes:
        dense_loss: Loss of the dense model, nats per label.
        predictors: Predictors in use; those of ``config.predictor`` after the first measurement.

    Raises:
        ValueError: LeMo does not support the model, there is no row, or a row has padding or no
            label.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row], predictors: Any = None):
        check_model(transformers_model(model))
        self.model = model
        self.predictors = predictors
        self.rows = [_as_batch(row, input_device(model)) for row in rows]
        if not self.rows:
            raise ValueError("calibration needs at least one row of tokens, got none.")
        with evaluating(model), torch.no_grad():
            self._dense = [self._token_losses(row) for row in self.rows]
        asked = [_targets(row) != IGNORE_INDEX for row in self.rows]
        self._labels = [int(row.sum()) for row in asked]
        if not all(self._labels):
            raise ValueError("a calibration row has no label but -100: leave it out.")
        sums = [float(loss[0, row[0]].sum()) for loss, row in zip(self._dense, asked, strict=True)]
        self.dense_loss = sum(sums) / sum(self._labels)

    def __call__(self, config: LeMoConfig) -> Measurement:
        """Measure all rows under ``config``.

        Raises:
            OSError, ValueError: Model, config and predictors do not fit, see `apply_lemo`.
        """
        # A checkpointed layer would be run through the model's checkpoint function for nothing.
        config = dataclasses.replace(config, recompute="none", offload_gib=None)
        rise: Tensor | float = 0.0
        kept: Tensor | int = 0
        blocks = 0
        with sparse_evaluation(self.model), _lemo_on(self.model, config, self.predictors) as lemo:
            self.predictors = self.predictors or lemo.predictor
            for row, dense, labels in zip(self.rows, self._dense, self._labels, strict=True):
                loss, asked = self._sparse_losses(lemo, row)
                # As in training, the mean over what a row is asked stands for all its labels.
                excess = ((loss - dense) * asked).sum() / asked.sum().clamp_min(1)
                rise = rise + excess * labels / sum(self._labels)
                blocks += _num_blocks(row, config)
                sets = lemo.passes.tally.kept_blocks
                kept = kept + torch.stack([sets[i, "attention"].sum() for i in lemo.sparse_layers])
            retentions = [1.0] * len(lemo.rules)
            shares = torch.as_tensor(kept / blocks).tolist()
            for i, share in zip(lemo.sparse_layers, shares, strict=True):
                retentions[i] = share
        return Measurement(float(rise), tuple(retentions))

    def _sparse_losses(self, lemo: LeMo, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each token's loss in nats, ``[1, T]``, and which tokens count under the config."""
        asked = _targets(row) != IGNORE_INDEX
        kept: list[Tensor] = []

        def after_last(*_: Any) -> None:
            sparse_pass = lemo.passes.current
            assert sparse_pass is not None  # a sparse pass is under way
            kept.append(supervised(sparse_pass))

        handle = lemo.passes.last.register_forward_hook(after_last)
        try:
            lemo.passes.announced.promise(row["labels"], None)
            loss = self._token_losses(row)
        finally:
            handle.remove()
        return loss, asked & kept[0] if lemo.config.supervise == "kept" else asked

    def _token_losses(self, row: dict[str, Tensor]) -> Tensor:
        """Loss of each token's target in nats, ``[1, T]`` fp32; the head runs on one segment at a
        time."""
        inner = transformers_model(self.model)
        head, family = inner.get_output_embeddings(), family_of(inner.config)
        losses: list[Tensor] = []

        def before_head(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            handle.remove()
            pairs = zip(args[0].split(SEGMENT, 1), _targets(row).split(SEGMENT, 1), strict=True)
            for hidden, targets in pairs:
                logits = head(hidden).float()
                logits = logits / family.divisor(inner.config)
                softcap = family.softcap(inner.config)
                if softcap:
                    logits = (logits / softcap).tanh() * softcap
                losses.append(nn.functional.cross_entropy(logits.mT, targets, reduction="none"))
            return (args[0][:, :1],)

        handle = head.register_forward_pre_hook(before_head)
        try:
            self.model(input_ids=row["input_ids"], use_cache=False)
        finally:
            handle.remove()
        return torch.cat(losses, 1)

    def num_blocks(self, config: LeMoConfig) -> int:
        """Number of blocks of the longest row."""
        return max(_num_blocks(row, config) for row in self.rows)


@contextmanager
def sparse_evaluation(model: nn.Module) -> Iterator[None]:
    """Within this context passes are sparse, without gradients, and every module but the causal LM
    is in eval mode.

    LeMo reads the training flag of the causal LM alone; dropout, router noise and gradient
    checkpointing read those of their own modules.
    """
    with evaluating(model), torch.no_grad():
        transformers_model(model).training = True
        yield


@contextmanager
def _lemo_on(model: nn.Module, config: LeMoConfig, predictors: Any) -> Iterator[Any]:
    lemo = apply_lemo(model, config, predictors)
    try:
        yield lemo
    finally:
        remove_lemo(model)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that ``forward`` stores for its backward: each storage once, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    nodes: list[Any] = [loss.grad_fn]
    seen = set()
    while nodes:  # LeMo's loss holds a gradient on its graph node, where the hooks do not look
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
            if getattr(node, "grad_hidden", None) is not None:
                keep(node.grad_hidden)
    return sum(storage.nbytes() for storage in storages.values())


def _as_batch(row: Row, device: torch.device) -> dict[str, Tensor]:
    mask = row.get("attention_mask")
    if mask is not None and not torch.as_tensor(mask).all():
        raise ValueError(
            "a calibration row has padding (zeros in its attention_mask): remove the padding."
        )
    ids = torch.as_tensor(row["input_ids"], device=device).view(1, -1)
    labels = torch.as_tensor(row.get("labels", row["input_ids"]), device=device).view(1, -1)
    return {"input_ids": ids, "labels": labels}


def _targets(row: dict[str, Tensor]) -> Tensor:
    return shifted(row["labels"])


def _num_blocks(row: dict[str, Tensor], config: LeMoConfig) -> int:
    return -(-row["input_ids"].shape[1] // config.block_size)
