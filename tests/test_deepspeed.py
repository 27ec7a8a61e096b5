"""DeepSpeed ZeRO-2 and 3 on the CPU: two processes train as one process does."""

import pytest
import torch
from models import make_model
from processes import launch
from training_cases import CHECKPOINTED, assert_same, read, train

from lemo_hf.checks import check_sharded_head

EACH = {"agree_across_layers": False, "retention": 0.4}
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

TRAIN = """
import os
from pathlib import Path
from deepspeed.utils import safe_get_full_fp32_param
from test_deepspeed import ALL
from training_cases import make_trainer, write
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
os.environ["DS_ACCELERATOR"] = "cpu"
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
for name, (stage, case) in ALL.items():
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # even the smallest is shared out
    config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    for size in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        config[size] = "auto"
    config["train_micro_batch_size_per_gpu"] = "auto"
    unset_hf_deepspeed_config()  # the last case's; with it the model would be made in parts
    trainer = make_trainer(folder / name, deepspeed=config, **case)
    trainer.train()
    assert trainer.accelerator.distributed_type == "DEEPSPEED"
    trained = [pair for pair in trainer.model.named_parameters() if pair[1].requires_grad]
    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in trained}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    write(folder, name, (losses, weights), process)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with what two processes made of all cases."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    launch(TRAIN, folder, [2])
    return folder


@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one(two, tmp_path, name):
    assert_same(read(two, name), train(tmp_path, **ALL[name][1]))


def test_a_head_of_several_modules_is_refused_under_zero_3():
    head = make_model("llama").lm_head
    check_sharded_head(head)
    inside = torch.nn.Sequential(head)
    check_sharded_head(inside)
    head.weight.ds_id = 0  # the mark of a parameter that ZeRO-3 holds in parts
    check_sharded_head(head)
    with pytest.raises(ValueError, match="Sequential with modules inside.*ZeRO-3"):
        check_sharded_head(inside)
