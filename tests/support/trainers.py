"""A small LeMoTrainer, or another Trainer, and what tests compare of two of them."""

import torch
from transformers import (
    TrainingArguments,
)

from lemo_hf import LeMoConfig, LeMoTrainer
from lemo_hf.trainer import LeMoMixin
from support.models import make_model, with_lora

SPARSE = LeMoConfig(retention=0.5, block_size=8, policy="random", segment_size=40)
FULL = LeMoConfig(retention=1.0, block_size=8, segment_size=40)


def dataset(rows=32, tokens=64, answers=None):
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(3))
    samples = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    if answers is not None:
        for sample in samples:
            sample["labels"][: tokens - answers] = [-100] * (tokens - answers)
    return samples


def make_trainer(tmp_path, config, *, cls=LeMoTrainer, model=None, data=None, **arguments):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        "report_to": "none",
    }
    trainer_options = {}
    for name in ("callbacks", "compute_loss_func", "data_collator", "eval_dataset", "model_init"):
        if name in arguments:
            trainer_options[name] = arguments.pop(name)
    if issubclass(cls, LeMoMixin):
        trainer_options["lemo_config"] = config
    if "model_init" not in trainer_options:
        trainer_options["model"] = with_lora(make_model("llama")) if model is None else model
    return cls(
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=dataset() if data is None else data,
        **trainer_options,
    )


def losses(trainer, **train):
    trainer.train(**train)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def adapter(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_weights(a, b, **tolerance):
    for name, value in adapter(a).items():
        torch.testing.assert_close(value, adapter(b)[name], msg=name, **tolerance)
