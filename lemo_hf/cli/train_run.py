"""The Trainer of `lemo train`, which copes with what a killed process, a full disk or another run
left."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from lemo_hf.cli.train_folder import write_settings
from lemo_hf.lemo import LeMo
from lemo_hf.run_card import CARD_NAME, is_run_card
from lemo_hf.storage.checkpoints import STATE_NAME, weights_in
from lemo_hf.storage.files import read_json, whole_file
from lemo_hf.trainer import LeMoMixin, LeMoTrainer

logger = logging.getLogger(__name__)


class RunMixin(LeMoMixin):
    """Puts the run's settings beside all weights that a trainer saves.

    Args:
        settings: Settings of the run, as YAML text.
        asks: Whether labels cover only a part of each row, and not all of it; None: not known.
        **options: Arguments of the trainer.
    """

    # Whether training went on from a checkpoint of the last step, so that no step was left, and
    # whether what such a run writes at its end lay there.
    finished = saved = False

    def __init__(self, settings: str, asks: bool | None = None, **options: Any):
        self.settings, self.asks = settings, asks
        self._card_lay_there = False
        self._users_card: bytes | None = None
        super().__init__(**options)

    def _apply_lemo(self, *args: Any, **kwargs: Any) -> LeMo:
        lemo = super()._apply_lemo(*args, **kwargs)
        lemo.asks = self.asks
        return lemo

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As LeMoTrainer's, but from a checkpoint of the last step it takes no further step, as
        Trainer would."""
        self._look_for_card()
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, STATE_NAME))
            whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            if whole and _is_last(state, self.args):
                self._load_from_checkpoint(resume_from_checkpoint)
                self.finished, self.state = True, state
                if (ended := self._ended(state.global_step)) is not None:
                    self.saved, self.state = True, ended  # its log has the end of training too
                if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                return TrainOutput(state.global_step, 0.0, {"epoch": state.epoch or 0.0})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _ended(self, step: int) -> TrainerState | None:
        """The state that the run left when it had written everything else; None: it did not."""
        path = Path(self._output_dir(), STATE_NAME)
        try:
            state = TrainerState.load_from_json(str(path))
        except (OSError, ValueError, TypeError):  # never written, or damaged
            return None
        whole = state.global_step == step and weights_in(path.parent)
        return state if whole else None

    @property
    def has_results(self) -> bool:
        """Whether the end of the run has something to write. A finished run whose files all lie
        there has only what is evaluated anew."""
        return not self.saved or self.eval_dataset is not None

    def write_results(self, metrics: dict[str, float]) -> dict[str, float]:
        """Save what the run has made, evaluate, and push if that was asked for.

        Args:
            metrics: Metrics of the training that has ended.

        Returns:
            These metrics, and those of the evaluation.
        """
        if not self.saved:
            self.save_model()
        if not self.finished:  # else its loss and time are those of no step
            self.save_metrics("train", metrics)
        if self.eval_dataset is not None:
            evaluated = self.evaluate()
            self.save_metrics("eval", evaluated)
            metrics = {**metrics, **evaluated}
        if self.has_results:
            self.save_state()
        if self.args.push_to_hub:
            self.push_to_hub()  # with a model card
        elif self.has_results:
            self.create_model_card()
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As LeMoTrainer's; writes the settings first, so that a complete checkpoint has them."""
        if self.args.should_save:
            write_settings(output_dir or self._output_dir(), self.settings)
        try:
            super().save_model(output_dir, _internal_call=_internal_call)
        finally:
            self._put_card_back()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As LeMoTrainer's if the run found no card; else only the section on what trained is
        written anew, and a card of the user's stays as it is."""
        if not self._card_lay_there:
            super().create_model_card(*args, **kwargs)
        elif self._users_card is None:
            self._add_to_card(self._output_dir())

    def _look_for_card(self) -> None:
        path = Path(self._output_dir(), CARD_NAME)
        self._card_lay_there = path.is_file()
        if not self._card_lay_there or is_run_card(path):
            return
        self._users_card = path.read_bytes()
        if self.is_world_process_zero():
            logger.warning(
                "%s is no model card of a run: it stays as it is, and what trained is not written.",
                path,
            )

    def _put_card_back(self) -> None:
        """PEFT and LeMoTrainer write into any card that lies beside weights."""
        path = Path(self._output_dir(), CARD_NAME)
        mine = self._users_card
        if mine is None or not self.args.should_save or path.read_bytes() == mine:
            return
        with whole_file(path) as part:
            Path(part).write_bytes(mine)

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """As Trainer's; files are written as a whole, and an ``all_results.json`` that a killed
        process left damaged is dropped."""
        if not self.is_world_process_zero():
            return
        _write(Path(self._output_dir(), f"{split}_results.json"), metrics)
        if combined:
            path = Path(self._output_dir(), "all_results.json")
            try:
                before = read_json(path)
            except (OSError, ValueError):
                before = {}
            _write(path, {**before, **metrics})


class RunTrainer(RunMixin, LeMoTrainer):
    """`LeMoTrainer` of a run of `lemo train`."""


def _is_last(state: TrainerState, args: Any) -> bool:
    if args.max_steps > 0:
        return args.max_steps <= state.global_step
    return 0 < args.num_train_epochs <= (state.epoch or 0.0)


def _write(path: Path, metrics: dict[str, Any]) -> None:
    with whole_file(path) as part:
        text = json.dumps(metrics, indent=4, sort_keys=True)
        Path(part).write_text(text, encoding="utf-8")
