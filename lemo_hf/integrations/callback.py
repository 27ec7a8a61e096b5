"""`LeMoCallback`: LeMo for launchers that make the Trainer themselves and take callbacks.

A Trainer calls ``on_init_end`` before it prepares the model (gradient checkpointing, Liger,
`torch.compile`, DDP, FSDP), and ``on_train_begin`` after that. LeMo is put on the model at the
first of these calls that has a model. It is removed at the end of training, unless FSDP2 has
derived classes from those of the layers; then it stays on the model, and evaluation is dense all
the same.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lemo_hf.announce import announce, follow_log_level
from lemo_hf.config import LeMoConfig, check_config
from lemo_hf.core.checks import check_trainer
from lemo_hf.lemo import LeMo
from lemo_hf.patch import lemo_of, remove_lemo, take_over, transformers_model
from lemo_hf.run_card import RunFacts, add_run
from lemo_hf.stopwatch import Stopwatch


class LeMoCallback(TrainerCallback):
    """Callback that makes the training passes of its Trainer sparse.

    The ``lemo/`` figures are in the Trainer's log history, and callbacks after this one report
    them. ``lemo_config.json`` and the predictor are saved in every checkpoint and in
    ``output_dir``, whose model card says at the end of training what trained.

    If you make the Trainer yourself, `LeMoTrainer` does more: a loss outside the model
    (``compute_loss_func``) covers kept tokens alone, and a run resumes with its own predictor. With
    the callback such a loss covers all tokens.

    Args:
        lemo_config: Settings of what each layer leaves out in training.

    Raises:
        ValueError: LeMo does not support the model or the way it is run.
    """

    def __init__(self, lemo_config: LeMoConfig):
        check_config(lemo_config)
        self.lemo_config = lemo_config
        self.lemo: LeMo | None = None
        self._facts: RunFacts | None = None
        self._stopwatch = Stopwatch()

    def on_init_end(
        self, args: TrainingArguments, *_: Any, model: nn.Module | None = None, **__: Any
    ) -> None:
        """Put LeMo on the model: the Trainer is made, and its model not yet prepared."""
        if model is not None:  # else it comes from ``model_init``
            self._apply(args, model)

    def on_train_begin(
        self, args: TrainingArguments, *_: Any, model: nn.Module | None = None, **__: Any
    ) -> None:
        """Put LeMo on a model that came late (from ``model_init``): it is prepared now."""
        assert model is not None  # Trainer has one by now
        lemo = self.lemo
        if lemo is None or lemo_of(model) is not lemo:
            lemo = self._apply(args, model)
        announce(args, lemo.describe())
        lemo.passes.tally.reset()
        lemo.passes.resting = False
        self._stopwatch.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Tell LeMo which step begins: chance draws anew, and the finish may begin."""
        assert self.lemo is not None  # from ``on_train_begin`` to ``on_train_end``
        self.lemo.begin_step(state.global_step, state.max_steps)
        self._stopwatch.go_on()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Print what the first batch kept."""
        assert self.lemo is not None
        self.lemo.end_step()
        first = self.lemo.take_first_batch()
        if first is not None:
            announce(args, first)
        self._mark(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note the time: an evaluation or a checkpoint may come."""
        self._mark(control)

    def _mark(self, control: TrainerControl) -> None:
        self._stopwatch.mark(wait=control.should_evaluate or control.should_save)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Note the time if another callback evaluates before the step has ended for this one."""
        if not self._stopwatch.marked:
            self._stopwatch.mark(wait=False)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """An evaluation is none of the time of training."""
        self._stopwatch.leave_out()

    def on_predict(self, *_: Any, **__: Any) -> None:
        """Nor are predictions."""
        self._stopwatch.leave_out()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        logs: dict[str, float] | None = None,
        **__: Any,
    ) -> None:
        """Add LeMo's figures to a training log."""
        if logs is None or "loss" not in logs or self.lemo is None:
            return
        figures = self.lemo.take_figures(self._stopwatch.lap())
        logs.update(figures)
        state.log_history[-1].update(figures)  # a copy of logs

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Save LeMo's files in the checkpoint."""
        assert self.lemo is not None and args.output_dir is not None
        checkpoint = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and os.path.isdir(checkpoint):
            self.lemo.save_files(checkpoint)
        self._stopwatch.leave_out()  # nor is saving the time of training

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        model: nn.Module | None = None,
        **__: Any,
    ) -> None:
        """Restore the stock model; what trained is in the card of ``output_dir``."""
        assert self.lemo is not None and model is not None and args.output_dir is not None
        if args.should_save:
            self.lemo.save_files(args.output_dir)
        if state.is_world_process_zero and state.global_step:
            config, described = self.lemo.config, self.lemo.describe()
            base = transformers_model(model).config._name_or_path
            processes = args.world_size
            rows = args.train_batch_size * args.gradient_accumulation_steps * processes
            self._facts = RunFacts(config, described, base, state, rows, processes)
            self.add_to_card(args.output_dir)
        remove_lemo(model)
        self.lemo = None

    def add_to_card(self, folder: str | os.PathLike) -> None:
        """Write what trained into the model card in ``folder``.

        Once more, if a card was made anew since the end of training: Trainer's
        ``create_model_card`` and ``push_to_hub`` do that. Without a training that ended, and in
        other processes than the first, nothing is written.

        Args:
            folder: Directory of the card, which is made if it has none.
        """
        if self._facts is not None:
            add_run(folder, self._facts)

    def _apply(self, args: TrainingArguments, model: nn.Module) -> LeMo:
        follow_log_level(args)
        _check(args, self.lemo_config)
        with args.main_process_first(desc="loading the LeMo predictor"):
            self.lemo = take_over(model, self.lemo_config)
        transformers_model(model).add_model_tags(["lemo-hf"])
        return self.lemo


def _check(args: TrainingArguments, config: LeMoConfig) -> None:
    """Raises ValueError if a callback cannot do what the settings need."""
    state = AcceleratorState()
    parallelism = getattr(state, "parallelism_config", None)
    check_trainer(args, parallelism, getattr(state, "fsdp_plugin", None), config)
    if any(base.__module__.startswith("trl.") for base in type(args).__mro__):
        raise ValueError(
            f"{type(args).__name__} belongs to a TRL trainer, whose loss LeMoCallback cannot reach."
            " For SFT use lemo_hf.integrations.trl.LeMoSFTTrainer, for DPO "
            "lemo_hf.integrations.trl_dpo.LeMoDPOTrainer; other TRL trainers are not supported "
            "(KTO; GRPO and RLOO, whose sampler reads every token)."
        )
    if config.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence_parallel_size={config.sequence_parallel_size}: processes that share a "
            "sequence must get the same rows, which a callback cannot arrange. Use LeMoTrainer."
        )
    if args.label_smoothing_factor and config.supervise == "kept":
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} is computed outside the model, "
            "where LeMoCallback cannot leave eliminated tokens out. Set it to 0, use LeMoTrainer, "
            "or set LeMoConfig(supervise='all')."
        )
