"""`ReportCallback`: what a run's page needs and Trainer does not keep."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from lemo_hf.batch.tally import Seen
from lemo_hf.patch import LeMo, lemo_of, transformers_model
from lemo_hf.report.data import read_record
from lemo_hf.report.environment import environment
from lemo_hf.report.page import RECORD_NAME, write_report
from lemo_hf.storage.files import whole_file, write_json


class ReportCallback(TrainerCallback):
    """Keeps retention by layer at each log; writes ``report.html`` at the end.

    Beside the page it writes ``lemo_report.json`` (at each log, as a whole) and Trainer's own
    ``trainer_state.json`` into the output directory. A resumed run goes on with both. Retention is
    counted on the device and read when Trainer logs, so that no step waits for it. Files are
    process 0's, and so is what they say.
    """

    def __init__(self) -> None:
        self._record: dict[str, Any] = {}  # stays empty but in process 0's trainings
        self._lemo: LeMo | None = None
        self._layers = 0
        self._reset()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        model: nn.Module | None = None,
        **__: Any,
    ) -> None:
        """Note what is trained, and listen to its passes."""
        assert model is not None  # Trainer has one by now
        inner = transformers_model(model)
        self._stop_listening()  # a training that failed had no end
        self._lemo = lemo_of(model)
        self._layers = 0 if self._lemo is None else len(self._lemo.rules)
        if self._lemo is not None:
            self._lemo.passes.tally.listeners.append(self._count)
        self._reset()
        if state.is_world_process_zero:
            rows = _rows_until(Path(_directory(args), RECORD_NAME), state.global_step)
            self._record = {
                "model": _model_facts(model, inner),
                "lemo": None if self._lemo is None else self._lemo.config.to_dict(),
                "sparse": None if self._lemo is None else self._lemo.describe(),
                "environment": environment(),
                "rows": rows,
            }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        logs: dict[str, float] | None = None,
        **__: Any,
    ) -> None:
        """Keep a row for each training log."""
        if not self._record or "loss" not in (logs or {}):
            return
        row: dict[str, Any] = {"step": state.global_step}
        if self._lemo is not None and self._kept:
            row |= {name: self._shares(kept, self._lemo) for name, kept in self._kept.items()}
        self._record["rows"].append(row)
        self._reset()
        directory = _directory(args)
        os.makedirs(directory, exist_ok=True)
        with whole_file(Path(directory, RECORD_NAME)) as path:
            write_json(path, self._record)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Write the page."""
        self._stop_listening()
        if state.is_world_process_zero:
            directory = _directory(args)
            os.makedirs(directory, exist_ok=True)
            with whole_file(Path(directory, RECORD_NAME)) as path:
                write_json(path, self._record)
            state.save_to_json(os.path.join(directory, "trainer_state.json"))
            write_report(directory)

    def _stop_listening(self) -> None:
        if self._lemo is not None and self._count in self._lemo.passes.tally.listeners:
            self._lemo.passes.tally.listeners.remove(self._count)

    def _reset(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._blocks: Tensor | int = 0

    def _count(self, seen: Seen) -> None:
        """Add the kept blocks of a pass."""
        assert self._lemo is not None  # whose pass it was
        for name in ("attention", "mlp"):
            sets = [seen.kept_blocks[i, name].sum() for i in self._lemo.sparse_layers]
            self._kept[name] = self._kept.get(name, 0) + torch.stack(sets)
        self._blocks = self._blocks + seen.real_blocks.sum()

    def _shares(self, kept: Tensor, lemo: LeMo) -> list[float]:
        """Share of the blocks that each layer kept; 1 for dense ones."""
        shares = [1.0] * self._layers
        for i, share in zip(lemo.sparse_layers, (kept / self._blocks).tolist(), strict=True):
            shares[i] = share
        return shares


def _directory(args: TrainingArguments) -> str:
    assert args.output_dir is not None  # TrainingArguments settles it when made
    return args.output_dir


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """What a run that goes on had written before."""
    return [row for row in read_record(path).get("rows", []) if row["step"] <= step] if step else []


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Elements of the parameters that are trained, and of all; those that ZeRO-3 shards, too."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


def _model_facts(model: nn.Module, inner: PreTrainedModel) -> dict[str, Any]:
    trained, total = parameter_counts(model)
    return {
        "name": inner.config._name_or_path or type(inner).__name__,
        "type": inner.config.model_type,
        "layers": inner.config.get_text_config().num_hidden_layers,
        "parameters": total,
        "trained": trained,
        "dtype": str(inner.dtype).removeprefix("torch."),
    }
