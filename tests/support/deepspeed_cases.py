"""What several processes train under DeepSpeed."""

from support.training_cases import CHECKPOINTED

EACH = {"policy": "pooled", "agree_across_layers": False, "retention": 0.4}
CASES = {
    "answers": {"lemo": EACH, "data": "answers"},
    "scattered": {"lemo": EACH, "data": "scattered"},
    "padded": {"data": "padded", "gradient_accumulation_steps": 2, **CHECKPOINTED},
}
ALL = {
    f"zero{stage}-{what}-{name}": (stage, {"lora": what == "lora", **case})
    for stage in (2, 3)
    for what in ("lora", "full")
    for name, case in CASES.items()
}
# AdamW, whose state must come back as well.
SAVED = {
    f"saved-zero{stage}-{what}": (
        stage,
        {
            "lora": what == "lora",
            "lemo": EACH,
            "data": "answers",
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    )
    for stage in (2, 3)
    for what in ("lora", "full")
}
OFFLOADED = {name.replace("saved", "offloaded"): case for name, case in SAVED.items()}
