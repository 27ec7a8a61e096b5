"""What several GPUs train through NCCL."""

import logging

from support import ddp_cases, fsdp_cases, sequence_cases

ENGINES = {
    "ddp": ddp_cases.ALL,
    "fsdp": fsdp_cases.ALL,
    "sequence": sequence_cases.ALL,
    # DDP too, whose buckets are filled by gradients that come all at once.
    "graphs": {
        "lora" if lora else "full": {
            "lora": lora,
            "lemo": {"cuda_graphs": True},
            "model_options": {"implementation": "sdpa"},
            "max_steps": 5,
        }
        for lora in (True, False)
    },
}
PASSES = [name for name in sequence_cases.PASSES if name != "qwen3_moe"]


class Refuse(logging.Handler):
    """What is warned of is an error: that a batch ran without a graph."""

    def emit(self, record):
        raise AssertionError(record.getMessage())
