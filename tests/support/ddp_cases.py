"""What several processes train under DDP."""

import transformers
from packaging import version

from support.training_cases import (
    CHECKPOINTED,
)

EACH = {"policy": "pooled", "agree_across_layers": False, "retention": 0.4}
THRESHOLD = {"threshold": 1.2, "agree_across_layers": False}
CASES = {
    "pooled": {"lemo": EACH},
    "own_mlp_sets": {"lemo": {**EACH, "mlp_retention": 0.3}, "ddp_find_unused_parameters": False},
    "answers": {"data": "answers", "ddp_find_unused_parameters": True},
    "padded": {"data": "padded", "lemo": EACH, "ddp_find_unused_parameters": False},
    "thresholds": {"lemo": THRESHOLD, "ddp_find_unused_parameters": True},
    "accumulated": {"lemo": EACH, "data": "answers", "gradient_accumulation_steps": 2},
    # The last step is the finish, of rows that are labelled throughout.
    "finish": {"data": "answers", "ddp_find_unused_parameters": False},
    "checkpointed": {"lemo": THRESHOLD, "data": "padded", **CHECKPOINTED},
    "checkpointed_unused": {
        "lemo": EACH,
        "data": "answers",
        "gradient_accumulation_steps": 2,
        "ddp_find_unused_parameters": False,
        **CHECKPOINTED,
    },
}
ALL = {f"{what}-{name}": {"lora": what == "lora", **case} for name, case in CASES.items()
       for what in (("lora", "full") if "answers" in case.values() else ("lora",))}  # fmt: skip
# AdamW, whose state must come back as well.
SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
RESUMED = {
    f"saved-{what}": {
        "lora": what == "lora",
        "lemo": EACH,
        "data": "answers",
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-5,  # or a gradient that is rounding alone would be a whole step
        **SAVED,
    }
    for what in ("lora", "full")
}
# transformers 5.17 loads an optimizer to "cpu:0" in several processes, which torch refuses.
RESUMES = version.parse(transformers.__version__) >= version.parse("5.23")
BROKEN = {
    "lora": True,
    "lemo": EACH,
    "data": "answers",
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
}
