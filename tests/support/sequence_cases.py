"""What several processes train that share each row."""

import os

import torch
import torch.distributed as dist

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.config import LEVELS
from lemo_hf.predictors.block_predictor import BlockPredictor
from support.models import batch, loss_and_gradients, make_model, with_lora
from support.processes import device
from support.training_cases import (
    CHECKPOINTED,
    ROWS_A_STEP,
    make_trainer,
)

EACH = {"policy": "pooled", "agree_across_layers": False, "retention": 0.4}
RECENT = {"policy": "recent"}  # the last process holds nearly all kept rows, another hardly any
# 70 tokens are 9 blocks: the last one is short, and shards differ.
PASSES = {
    "default": ("llama", {}),
    "everything": ("llama", {"retention": 1.0}),
    "own_sets": ("llama", {**EACH, "mlp_retention": 0.3}),
    "thresholds": ("llama", {"threshold": 1.0, "agree_across_layers": False}),
    "dense_layers": ("llama", {**RECENT, "dense_first_layers": 1, "dense_last_layers": 1}),
    "random": ("llama", {**EACH, "policy": "random"}),
    "predictor": ("llama", {**EACH, "policy": "predictor"}),
    "all_labels": ("llama", {"supervise": "all"}),
    "some_labels": ("llama", EACH),
    "overlap": ("llama", {"policy": "overlap", "retention": 0.4}),
    "chunks": ("llama", {**EACH, "policy": "chunks"}),
    **{f"recompute_{level}": ("llama", {**RECENT, "recompute": level})
       for level in LEVELS[1:]},
    "offload": ("llama", {**EACH, "recompute": "selective", "offload_gib": 1}),
    "qwen3": ("qwen3", EACH),
    "granite": ("granite", {**EACH, "recompute": "full"}),
    "olmo2": ("olmo2", EACH),
    "phi3": ("phi3", EACH),
    "glm4": ("glm4", EACH),
    "cohere": ("cohere", {**EACH, "recompute": "full"}),
    "gpt_neox": ("gpt_neox", EACH),
    "qwen3_moe": ("qwen3_moe", {**EACH, "recompute": "selective"}),
}  # fmt: skip


def one_pass(name, processes=1, lora=False):
    """Loss, and the gradient of every parameter, of one row on ``processes`` processes."""
    family, options = PASSES[name]
    model = make_model(family, "sdpa")
    if lora:
        model = with_lora(model)
    model.to(device())
    predictors = None
    if options.get("policy") == "predictor":
        torch.manual_seed(4)
        predictors = [BlockPredictor(32, 8, rank=4) for _ in range(4)]
        for predictor in predictors:
            for parameter in predictor.parameters():
                parameter.data.normal_(0, 0.3)
    config = LeMoConfig(block_size=8, segment_size=16, sequence_parallel_size=processes, **options)
    apply_lemo(model, config, predictors)
    row = {key: value[:1].to(device()) for key, value in batch().items()}
    if name in ("some_labels", "overlap"):
        row["labels"][:, :50] = -100  # the first of two processes has no label
    loss, gradients = loss_and_gradients(model, **row)
    if processes > 1:  # as engines do
        total = torch.tensor(loss, device=device())
        for tensor in (total, *gradients.values()):
            dist.all_reduce(tensor)
            tensor /= processes
        loss = total.item()
    return [loss], {key: value.cpu() for key, value in gradients.items()}


TRAINED = {
    "pooled": {"lemo": EACH},
    "dense": {"lemo": {"retention": 1.0}},
    "recent": {"lemo": RECENT},
    "answers": {"lemo": EACH, "data": "answers"},
    "lengths": {"data": "padded", "ddp_find_unused_parameters": False, **CHECKPOINTED},
    "full": {"lemo": {**EACH, "recompute": "full", "offload_gib": 1}, "data": "answers"},
    "means": {"lemo": EACH, "data": "whole", "average_tokens_across_devices": False},
}
SDPA = {"model_options": {"implementation": "sdpa"}}
ALL = {f"{what}-{name}": {"lora": what == "lora", **SDPA, **case}
       for name, case in TRAINED.items()
       for what in (("lora", "full") if name in ("answers", "lengths") else ("lora",))}  # fmt: skip
SAVED = {
    **ALL["lora-answers"],
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


class Streamed(torch.utils.data.IterableDataset):
    """Rows that come one after the other."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def by_rows(folder, size=2, resume=None, streamed=False, **case):
    """Trains a case row by row, each shared by ``size`` processes; as many rows a step as ever."""
    groups = int(os.environ.get("WORLD_SIZE", "1")) // size
    case["lemo"] = {**case.get("lemo", {}), "sequence_parallel_size": size}
    trainer = make_trainer(folder, gradient_accumulation_steps=ROWS_A_STEP // groups, **case)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    if streamed:
        trainer.train_dataset = Streamed(trainer.train_dataset)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


THREE = {"num_attention_heads": 3, "num_key_value_heads": 3}
REFUSED = {
    "heads": ({**THREE, "hidden_size": 48}, {}, {}, "does not divide the 3 attention heads"),
    "eager": ({"implementation": "eager"}, {}, {}, "attn_implementation='eager'"),
    "oracle": ({}, {"policy": "oracle"}, {}, "policy='oracle'"),
    "opt": ({"model_type": "opt"}, {}, {}, "learned positions"),
    "batch": ({}, {}, {"rows": 2}, "the batch has 2: set per_device_train_batch_size=1"),
    "short": ({}, {}, {"tokens": 8}, "8 tokens has fewer blocks"),
    "padding": ({}, {}, {"padding": 5}, "padding and attention masks"),
    "packed": ({}, {}, {"document": 30}, "packed documents"),
    "positions": ({"model_type": "ministral3"}, {}, {}, "read more inputs than their rows"),
    "window": ({"model_type": "mistral"}, {}, {}, "a sliding window of 24"),
    "no_labels": ({}, {}, {"labels": False}, "own loss, made from labels"),
}


def refuse(name):
    """The error of one case; empty if there is none."""
    model_options, options, row, _ = REFUSED[name]
    try:
        model = make_model(**{"model_type": "llama", "implementation": "sdpa", **model_options})
        apply_lemo(model, LeMoConfig(block_size=8, sequence_parallel_size=2, **options))
        inputs = batch(row.get("rows", 1), row.get("tokens", 70))
        if "padding" in row:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][:, : row["padding"]] = 0
        if "document" in row:
            inputs["position_ids"] = torch.arange(70)[None] % row["document"]
        if "labels" in row:
            del inputs["labels"]
        model(**inputs)
    except ValueError as error:
        return str(error)
    return ""
