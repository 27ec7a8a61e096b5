"""A small training whose page is written."""

import json

from transformers import TrainingArguments

from lemo_hf import LeMoTrainer
from lemo_hf.report.callback import ReportCallback
from support.models import batch, make_model, with_lora

ROWS = [{name: values[0] for name, values in batch(1, 96).items()}] * 8


def train(*args, resume=None, **options):
    trainer = make_trainer(*args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def make_trainer(folder, lemo_config, steps=4, model=None, rows=ROWS, callbacks=(), **arguments):
    settings = {"max_steps": steps, "logging_steps": 2, "per_device_train_batch_size": 2}
    settings |= {"save_strategy": "no", "use_cpu": True, "learning_rate": 1e-2, "report_to": "none"}
    return LeMoTrainer(
        model=model or with_lora(make_model("llama")),
        args=TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:2],
        lemo_config=lemo_config,
        callbacks=[ReportCallback(), *callbacks],
    )


def record(folder):
    return json.loads((folder / "lemo_report.json").read_text())
