"""What several processes train under FSDP2."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from lemo_hf import LeMoConfig, apply_lemo
from support.models import make_model
from support.training_cases import (
    CHECKPOINTED,
    ROWS_A_STEP,
    padded,
    rows,
    whole,
)

EACH = {"policy": "pooled", "agree_across_layers": False, "retention": 0.4}
CASES = {
    "pooled": {"lemo": EACH},
    # The two processes take 1 and 8 segments of the loss, or none and 8.
    "answers": {"lemo": EACH, "data": "answers"},
    "answers_checkpointed": {"data": "answers", "gradient_accumulation_steps": 2, **CHECKPOINTED},
    "padded": {"lemo": EACH, "data": "padded", **CHECKPOINTED},
    "thresholds": {"lemo": {"threshold": 1.0, "agree_across_layers": False}},
}
ALL = {
    f"{what}-{name}": {"lora": what == "lora", **case}
    for name, case in CASES.items()
    for what in (("full",) if name in ("padded", "thresholds") else ("lora", "full"))
}
# Only with LoRA: of FSDPLlamaForCausalLM Trainer does not know that labels must be shifted.
ALL["lora-trainers_loss"] = {
    "lora": True,
    "lemo": {"supervise": "all"},
    "label_smoothing_factor": 0.1,
}
ALL["head-answers"] = {**ALL["lora-answers"], "lora_options": {"modules_to_save": ["lm_head"]}}
ALL["tied-answers"] = {**ALL["full-answers"], "model_options": {"tie_word_embeddings": True}}


def one_pass(process=None, checkpointed=False):
    """Loss and gradients of four rows; of a process its two, with each Linear a unit of FSDP2.

    Each Linear then gathers whenever it is called. In the first two rows there is nothing to
    choose, in the others blocks are scored by queries and keys.
    """
    model = make_model("llama")
    apply_lemo(model, LeMoConfig(block_size=8, segment_size=16, **EACH))
    if checkpointed:
        model.gradient_checkpointing_enable(CHECKPOINTED["gradient_checkpointing_kwargs"])
    samples = rows("scattered")[:ROWS_A_STEP]
    items = sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)
    if process is not None:
        samples = samples[2 * process : 2 * process + 2]
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        for module in (*linears, *model.model.layers, model):
            fully_shard(module)
    loss = model(**padded(samples), num_items_in_batch=torch.tensor(items)).loss
    loss.backward()
    share = 1 if process is None else 2  # FSDP2 averages the processes' gradients
    gradients = {name: whole(p.grad) * share for name, p in model.named_parameters()}
    total = loss.detach()
    if process is not None:
        dist.all_reduce(total)
    return [total.item()], gradients


SAVED = {
    f"{kind}-{what}": {
        "kind": kind,
        "lora": what == "lora",
        "lemo": EACH,
        "data": "answers",
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-5,  # or a gradient that is rounding alone would be a whole step
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    for kind in ("FULL", "SHARDED")
    for what in ("lora", "full")
}
