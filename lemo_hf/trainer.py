"""`LeMoTrainer`: transformers' Trainer whose training passes are sparse."""

import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from lemo_hf.announce import announce, follow_log_level
from lemo_hf.config import LeMoConfig, check_config
from lemo_hf.core.checks import check_block_size, check_trainer
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.lemo import LeMo
from lemo_hf.overrides import overrides
from lemo_hf.parallel.sequence_parallel import sequence_group
from lemo_hf.patch import end_earlier, lemo_of, remove_lemo, take_over, transformers_model
from lemo_hf.predictors.predictor_set import LeMoPredictor
from lemo_hf.reported_loss import finite_loss
from lemo_hf.resuming import resumed_checkpoint, say_what_changed
from lemo_hf.run_card import RunFacts, add_run, keeps_users_card
from lemo_hf.stopwatch import TimedMixin
from lemo_hf.storage.files import WEIGHTS_NAME
from lemo_hf.storage.lengths import longest_row

logger = logging.getLogger(__name__)


class LeMoMixin(TimedMixin):
    """Mixin that makes the training passes of any Trainer sparse; it stands before the Trainer
    class.

    It adds one argument, ``lemo_config``. With None the Trainer is unchanged.
    """

    def __init__(self, *args: Any, lemo_config: LeMoConfig | None = None, **kwargs: Any):
        if lemo_config is not None:
            check_config(lemo_config)
        self.lemo_config = lemo_config
        self.lemo: LeMo | None = None
        self._in_step = False
        self._first_batch = True
        self._ops_a_token = 0
        super().__init__(*args, **kwargs)
        follow_log_level(self.args)
        if lemo_config is None:
            if not self._lemo_callbacks():
                end_earlier(self._model(), None)
        else:
            self._refuse_callbacks()
            check_trainer(
                self.args,
                getattr(self.accelerator, "parallelism_config", None),
                getattr(self.accelerator.state, "fsdp_plugin", None),
                lemo_config,
            )
            # All processes form groups together, so before they take turns.
            sequence_group(lemo_config.sequence_parallel_size)
            try:
                # What must be downloaded comes once; the other processes find it in the cache.
                with self.args.main_process_first(desc="loading the LeMo predictor"):
                    self._apply_lemo(self._model(), lemo_config)
            except OSError as error:
                # A checkpoint may hold the predictor, and evaluation needs none: train() decides.
                logger.warning(
                    "train() needs the predictor, unless it resumes from a checkpoint: %s", error
                )

    def _model(self) -> nn.Module:
        assert self.model is not None  # Trainer refuses to be made without one
        return self.model

    def _output_dir(self) -> str:
        assert self.args.output_dir is not None  # TrainingArguments settles it when made
        return self.args.output_dir

    def _apply_lemo(
        self, model: nn.Module, config: LeMoConfig, predictor: LeMoPredictor | None = None
    ) -> LeMo:
        resting = self.lemo is None or self.lemo.passes.resting
        self.lemo = take_over(model, config, predictor)
        self.lemo.passes.resting = resting  # a fresh model may come when training has begun
        transformers_model(model).add_model_tags(["lemo-hf"])
        return self.lemo

    def _lemo_callbacks(self) -> list[LeMoCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, LeMoCallback)]

    def _refuse_callbacks(self) -> None:
        if self._lemo_callbacks():
            raise ValueError(
                "this trainer has a lemo_config and a LeMoCallback, and a model can have LeMo only "
                "once: leave one of them out."
            )

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; the host does not wait until rows in pinned memory are copied."""
        super().create_accelerator_and_postprocess()
        if self.lemo_config is not None:
            self.accelerator.dataloader_config.non_blocking |= self.args.dataloader_pin_memory

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; the new model gets LeMo too (``model_init``, hyperparameter search)."""
        model = super().call_model_init(trial)
        if self.lemo is not None:  # the first model gets it at the end of __init__
            self._apply_lemo(model, self.lemo.config, self.lemo.predictor)
        return model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As Trainer's, after checks of what would otherwise fail in the middle of training."""
        self._ops_a_token = 0
        if self.lemo_config is not None:
            config = self.lemo_config
            self._refuse_callbacks()
            self._first_batch = True
            checkpoint = resumed_checkpoint(self.args, resume_from_checkpoint)
            if checkpoint:
                resume_from_checkpoint = checkpoint
                say_what_changed(config, checkpoint)
                self._resume_predictor(config, checkpoint)
            lemo = self._lemo_on_model(config)
            announce(self.args, lemo.describe())
            lemo.passes.tally.reset()
            lemo.passes.resting = False
            self._stopwatch.start()
        elif not self._lemo_callbacks():
            announce(self.args, "LeMo: there is no lemo_config, so every layer trains all tokens.")
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.lemo is not None:
                self.lemo.passes.resting = True
                self.lemo.end_run()

    def _lemo_on_model(self, config: LeMoConfig) -> LeMo:
        """The LeMo that `train` uses. It is made again if the predictor could not be loaded before,
        or if another trainer of the same model was made since."""
        if self.lemo is None:
            return self._apply_lemo(self._model(), config)
        if lemo_of(self._model()) is not self.lemo:
            return self._apply_lemo(self._model(), config, self.lemo.predictor)
        return self.lemo

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As Trainer's; LeMo learns which optimizer step this is."""
        if self.lemo is None:
            return super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)
        if self._first_batch:
            self._check_block_size(inputs, self.lemo.config)
            self._first_batch = False
        self.lemo.begin_step(self.state.global_step, self.state.max_steps)
        if overrides(self, "compute_loss") and num_items_in_batch is not None:
            device = self.args.device
            num_items_in_batch = torch.as_tensor(num_items_in_batch, device=device).float().clone()
        self._items, self._in_step = num_items_in_batch, True
        try:
            with self.lemo.training():
                loss = super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)
        finally:
            self._in_step = False
            self.lemo.end_step()
        first = self.lemo.take_first_batch()
        if first is not None:
            announce(self.args, first)
        return loss if self.lemo.passes.resting else self._reported(loss)

    def _reported(self, loss: Tensor) -> Tensor:
        """The loss as Trainer reports it, for which the GPU does not wait. A `training_step` of the
        user's gets it as it is."""
        total = getattr(self, "_tr_loss", None)  # since the last log; none in a loop of the user's
        if total is None or loss.device != total.device or overrides(self, "training_step"):
            return loss
        if not self.args.logging_nan_inf_filter:
            return loss
        steps = self.state.global_step - self._globalstep_last_logged
        return finite_loss(loss, total / (1 + steps))

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """As Trainer's, but parameters are counted once a run, since each count takes the host
        milliseconds."""
        count = super().floating_point_ops
        ids = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        trainers = getattr(count, "__func__", None) is Trainer.floating_point_ops
        if not trainers or ids is None or not ids.numel():
            return count(inputs)
        self._ops_a_token = self._ops_a_token or count(inputs) // ids.numel()  # proportional
        return self._ops_a_token * ids.numel()

    def _prepare_inputs(self, inputs: dict[str, Tensor | Any]) -> dict[str, Tensor | Any]:
        """As Trainer's; a user's own `compute_loss` gets labels that LeMo may strike."""
        inputs = super()._prepare_inputs(inputs)
        if self._in_step and overrides(self, "compute_loss") and "labels" in inputs:
            assert self.lemo is not None  # or no step would be marked
            labels = self.lemo.passes.announced.expect(inputs["labels"], self._items)
            inputs["labels"] = labels.tensor
        return inputs

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; processes that share sequences get the same rows."""
        group = None if self.lemo is None else self.lemo.passes.group
        if group is None:
            return super().get_train_dataloader()
        # accelerate tells by the mesh whose rows are the same; for all else it has none. Its
        # dispatcher of streamed rows knows no such groups, so each process reads for itself.
        state, loading = self.accelerator.state, self.accelerator.dataloader_config
        before = state.device_mesh, loading.dispatch_batches
        state.device_mesh, loading.dispatch_batches = group.mesh, False
        try:
            return super().get_train_dataloader()
        finally:
            state.device_mesh, loading.dispatch_batches = before

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """As Trainer's; a row that several processes share counts once."""
        return super().get_total_train_batch_size(args) // self._sequence_parallel_size()

    def _sequence_parallel_size(self) -> int:
        return 1 if self.lemo_config is None else self.lemo_config.sequence_parallel_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As Trainer's; LeMo also sees the labels of a loss that is made outside the model."""
        lemo = self.lemo if model.training else None
        if lemo is not None and not self._in_step and not lemo.passes.resting:
            # The user has a `training_step` of their own.
            lemo.begin_step(self.state.global_step, self.state.max_steps)
            lemo.end_step()  # passes are asked for by their labels
        with nullcontext() if lemo is None else lemo.training():
            if lemo is not None and self._loss_is_outside() and "labels" in inputs:
                labels = lemo.passes.announced.promise(inputs["labels"], num_items_in_batch)
                inputs = {**inputs, "labels": labels.tensor}
                num_items_in_batch = labels.num_items
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

    def _loss_is_outside(self) -> bool:
        """Whether the loss is made outside the model, from its output and labels that it does not
        get."""
        return self.compute_loss_func is not None or self.label_smoother is not None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with retention, kept tokens per second and peak memory in training logs."""
        if self.lemo is not None and "loss" in logs:
            logs.update(self.lemo.take_figures(self._stopwatch.lap()))
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, with LeMo's files beside the model and what trained in its card."""
        if self.lemo is not None and self.args.should_save:
            self.lemo.save_files(output_dir or self._output_dir())
        super().save_model(output_dir, _internal_call=_internal_call)
        if not _internal_call:
            self._add_to_card(output_dir or self._output_dir())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with a section on what trained. A card that the user wrote stays and gets
        the section alone, where Trainer would write another over it."""
        mine = self.lemo is not None and self.is_world_process_zero()
        if not (mine and keeps_users_card(self._output_dir())):
            super().create_model_card(*args, **kwargs)
        self._add_to_card(self._output_dir())

    def _add_to_card(self, directory: str) -> None:
        if self.lemo is None or not self.state.global_step or not self.is_world_process_zero():
            return
        base = transformers_model(self._model()).config._name_or_path
        rows = self.get_total_train_batch_size(self.args)
        processes = self.args.world_size // self._sequence_parallel_size()
        facts = RunFacts(self.lemo.config, self.lemo.describe(), base, self.state, rows, processes)
        add_run(directory, facts)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies only the files it knows from a checkpoint to what it pushes.
        if self.lemo is not None and self.is_world_process_zero():
            self.lemo.save_files(self._output_dir())
        super()._push_from_checkpoint(checkpoint_folder)

    def _check_block_size(self, inputs: Mapping[str, Any], config: LeMoConfig) -> None:
        """Raises ValueError if it is certain that no sequence is as long as one block.

        Checked at the first batch, since a collator may pack rows.
        """
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[-1] >= config.block_size:
            return
        longest = longest_row(self.train_dataset, config.block_size)
        # A batch longer than any row is packed, and another one may be longer.
        if longest is not None and ids.shape[-1] <= longest:
            check_block_size(config, longest)

    def _resume_predictor(self, config: LeMoConfig, checkpoint: str | os.PathLike) -> None:
        """Choose blocks by the checkpoint's predictor; the Hub is not asked."""
        weights = os.path.join(checkpoint, WEIGHTS_NAME)
        if config.policy != "predictor" or not os.path.isfile(weights):
            return
        saved = LeMoPredictor.from_pretrained(checkpoint)
        given = None if self.lemo is None else self.lemo.predictor
        if given is not None and given.same_as(saved):
            return
        if given is not None:
            logger.warning(
                "%s was trained with another predictor than %r: resuming with the checkpoint's "
                "predictor.",
                checkpoint,
                config.predictor,
            )
        remove_lemo(self._model())
        self._apply_lemo(self._model(), config, saved)


class LeMoTrainer(LeMoMixin, Trainer):
    """`transformers.Trainer` with one more argument, ``lemo_config``.

    Args:
        lemo_config: Settings of what each layer leaves out in training; None: plain `Trainer`.

    All other arguments, methods, callbacks and files are Trainer's. Evaluation, prediction and what
    is saved are those of the plain model.

    Raises:
        ValueError: LeMo does not support the model or the way it is run. Raised before training
            starts.
    """
