"""`ReportCallback`: what a run's page needs and Trainer does not keep."""

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from lemo_hf.lemo import LeMo
from lemo_hf.patch import lemo_of, transformers_model
from lemo_hf.report.data import read_record
from lemo_hf.report.environment import environment
from lemo_hf.report.kept import Kept
from lemo_hf.report.page import RECORD_NAME, write_report
from lemo_hf.report.places import add_moment, moments_until
from lemo_hf.storage.files import whole_file, write_json


class ReportCallback(TrainerCallback):
    """Keeps retention by layer and by place at each log; writes ``report.html`` at the end.

    Beside the page it writes ``lemo_report.json`` (at each log, as a whole) and Trainer's own
    ``trainer_state.json`` into the output directory. A resumed run goes on with both. Retention is
    counted on the device and read when Trainer logs, so that no step waits for it. Files are
    process 0's, and so is what they say.
    """

    def __init__(self) -> None:
        self._record: dict[str, Any] = {}  # stays empty but in process 0's trainings
        self._lemo: LeMo | None = None
        self._kept: Kept | None = None
        self._logged = 0  # the last step of the last log

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
        self._kept = None if self._lemo is None else Kept(self._lemo)
        self._logged = state.global_step
        if self._lemo is not None and self._kept is not None:
            self._lemo.passes.tally.listeners.append(self._kept.add)
        if state.is_world_process_zero:
            layers = None if self._kept is None else self._kept.place_layers
            before = read_record(Path(_directory(args), RECORD_NAME)) if self._logged else {}
            self._record = {
                "model": _model_facts(model, inner),
                "lemo": None if self._lemo is None else self._lemo.config.to_dict(),
                "sparse": None if self._lemo is None else self._lemo.describe(),
                "environment": environment(),
                "rows": _rows_until(before, self._logged),
                "place_layers": layers,
                "moments": _moments_until(before, self._logged, layers),
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
        taken = None
        if self._kept is not None:
            taken = self._kept.take(self._logged + 1, state.global_step)
        if taken is not None:
            row |= taken[0]
            add_moment(self._record["moments"], taken[1])
        self._record["rows"].append(row)
        self._logged = state.global_step
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
        if self._lemo is None or self._kept is None:
            return
        if self._kept.add in self._lemo.passes.tally.listeners:
            self._lemo.passes.tally.listeners.remove(self._kept.add)


def _directory(args: TrainingArguments) -> str:
    assert args.output_dir is not None  # TrainingArguments settles it when made
    return args.output_dir


def _rows_until(before: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """What a run that goes on had written before."""
    return [row for row in before.get("rows", []) if row["step"] <= step]


def _moments_until(
    before: dict[str, Any], step: int, layers: list[int] | None
) -> list[dict[str, Any]]:
    """Likewise; none if it had other curves."""
    if before.get("place_layers") != layers:
        return []
    return moments_until(before.get("moments", []), step)


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
