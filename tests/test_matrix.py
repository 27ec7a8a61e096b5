"""Trainer × PEFT method × batches × checkpointing: the stock stack at retention 1, and half of it.

Each cell is three trainings of a tiny model: the stock trainer, ours that leaves nothing out, and
ours that leaves out half.
"""

from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.grids import covering
from support.models import make_model
from support.paths import ROOT
from support.ragged import Padded, ragged
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer
from lemo_hf.integrations.callback import LeMoCallback

TRAINERS = ("trainer", "callback", "sft")
METHODS = {"full": None, "lora": {}, "dora": {"use_dora": True}}
BATCHES = ("padded", "packed")
CELLS = covering(TRAINERS, METHODS, BATCHES, (False, True))
ROWS = ragged(6) * 4  # seen four times, so that there is something to learn
TOKENIZER = ROOT / "examples/demo/model"


def model(method):
    tiny = make_model("llama", "sdpa", num_hidden_layers=2)
    if METHODS[method] is None:
        return tiny
    torch.manual_seed(0)
    return get_peft_model(tiny, LoraConfig(r=4, target_modules="all-linear", **METHODS[method]))


def settings(folder, method, checkpointing):
    return {
        "output_dir": folder,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3 if method == "full" else 3e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


def plain(folder, kind, method, batches, checkpointing, config):
    own = {}
    if kind == "callback" and config is not None:
        own["callbacks"] = [LeMoCallback(config)]
    elif config is not None:
        own["lemo_config"] = config
    return (LeMoTrainer if "lemo_config" in own else Trainer)(
        model=model(method),
        args=TrainingArguments(**settings(folder, method, checkpointing)),
        train_dataset=ROWS,
        data_collator=Padded() if batches == "padded" else DataCollatorWithFlattening(),
        **own,
    )


def sft(folder, method, batches, checkpointing, config):
    trl = pytest.importorskip("trl", minversion="1.16")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from lemo_hf.integrations.trl import LeMoSFTTrainer

    own = {} if config is None else {"lemo_config": config}
    packing = {"packing": True, "max_length": 128} if batches == "packed" else {}
    return (trl.SFTTrainer if config is None else LeMoSFTTrainer)(
        model=model(method),
        args=trl.SFTConfig(**settings(folder, method, checkpointing), **packing),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        **own,
    )


@cache
def losses(kind, method, batches, checkpointing, config):
    with TemporaryDirectory() as folder:
        if kind == "sft":
            trainer = sft(folder, method, batches, checkpointing, config)
        else:
            trainer = plain(folder, kind, method, batches, checkpointing, config)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if config is not None:
        kept = max(log["lemo/attention_retention"] for log in logs)
        assert kept == 1 if config.retention == 1 else kept < 0.8
    return [log["loss"] for log in logs]


@pytest.mark.parametrize(("kind", "method", "batches", "checkpointing"), CELLS)
def test_cell(kind, method, batches, checkpointing):
    cell = (method, batches, checkpointing)
    stock = losses("sft" if kind == "sft" else "trainer", *cell, None)
    whole = losses(kind, *cell, LeMoConfig(retention=1.0, block_size=8))
    assert whole == pytest.approx(stock, rel=1e-4)
    half = losses(kind, *cell, LeMoConfig(block_size=8, policy="random"))
    assert all(0 < loss < 20 for loss in half) and sum(half[3:]) < sum(half[:3])
