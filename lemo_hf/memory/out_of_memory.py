"""Out-of-memory errors of training steps, which say what takes less."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainingArguments

from lemo_hf.config import LeMoConfig

# Its name: the first of these that the installed transformers has; 5.17 knows the second alone.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


@contextmanager
def said_what_helps(
    config: LeMoConfig, layers: Iterable[nn.Module], finish: bool
) -> Iterator[None]:
    """Within this context `what_helps` is added to an out-of-memory error, which keeps its type."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        said, helps = str(error), what_helps(config, checkpointed, finish)
        if helps not in said:
            # One argument, in which accelerate looks for its words (`auto_find_batch_size`).
            error.args = (f"{said}\n{helps}",)
        raise


def what_helps(config: LeMoConfig, checkpointed: bool, finish: bool) -> str:
    """Settings that take less memory, the cheapest first, in one line.

    Args:
        config: The user's settings.
        checkpointed: Whether the model's gradient checkpointing is on.
        finish: Whether the finish has begun, in which rows keep more.
    """
    ways = []
    kept = config.retention
    least = min(kept) if isinstance(kept, tuple) else kept or 0
    if finish and config.finish_retention > least:  # it may not be lower
        ways.append(
            f"LeMoConfig(finish_retention=...) below {config.finish_retention:g}, since the last "
            "steps of the run have begun"
        )
    if not checkpointed and config.recompute in (None, "none", "mlp"):
        ways.append(f"{CHECKPOINTING}=True")
    if config.cuda_graphs:
        ways.append("LeMoConfig(cuda_graphs=False)")
    elif config.offload_gib is None:
        ways.append("LeMoConfig(offload_gib=...)")
    else:
        ways.append(f"more than offload_gib={config.offload_gib:g}")
    if config.retention is None:
        ways.append("a higher threshold")
    elif isinstance(config.retention, tuple):
        ways.append("lower retentions")
    else:
        ways.append(f"retention below {config.retention:g}")
    return (
        f"LeMo: what takes less memory, in this order: {'; '.join(ways)}; shorter rows or fewer in "
        "a batch. `lemo plan` says how much a step takes."
    )
