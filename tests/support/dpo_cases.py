"""Preference trainings to be run by any number of processes: four pairs a step."""

import os

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig

from lemo_hf import LeMoConfig
from lemo_hf.integrations.trl_dpo import LeMoDPOTrainer
from support.dpo import make_trainer, model
from support.training_cases import outcome

CONFIG = LeMoConfig(retention=0.5, block_size=8, chunk_size=16, agree_across_layers=False)
FULL = {"learning_rate": 0.02}
CASES = {
    "adapter": {"learning_rate": 0.1},
    "ref_model": FULL,
    "checkpointing": {"gradient_checkpointing": True, **FULL},
    "precomputed": {"precompute_ref_log_probs": True, "learning_rate": 0.1},
}


class InOrder(LeMoDPOTrainer):
    """Pairs come in their order, so that processes get those that one would."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(folder, name, engine="ddp"):
    """Runs one case to its end, of the pairs in ``folder``; its losses and trained weights."""
    AcceleratorState._reset_state()
    options = {"model": model(lora=False)}
    if name in ("ref_model", "checkpointing"):
        options["ref_model"] = model(lora=False).eval()
    else:
        options["peft_config"] = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")
    settings = dict(CASES[name])
    if engine == "fsdp":
        settings["fsdp"] = True
        settings["fsdp_config"] = {"version": 2, "reshard_after_forward": True}
    trainer = make_trainer(
        folder / name,
        CONFIG,
        # On disk, where processes find what TRL has computed for all of them.
        train_dataset=Dataset.load_from_disk(folder / "pairs"),
        cls=InOrder,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        optim="sgd",
        max_grad_norm=0,
        max_steps=4,
        seed=7,
        **options,
        **settings,
    )
    trainer.train()
    assert trainer.accelerator.is_fsdp2 == (engine == "fsdp")
    kept = [x["lemo/attention_retention"] for x in trainer.state.log_history if "loss" in x]
    assert all(share < 0.8 for share in kept)
    return outcome(trainer)
