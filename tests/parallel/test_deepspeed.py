"""DeepSpeed ZeRO-2 and 3 on the CPU: two processes train as one process does.

DeepSpeed compiles what it runs on CPUs when it is first asked for it: that takes minutes.
"""

import pytest
import torch
from support.deepspeed_cases import ALL, EACH, OFFLOADED, SAVED
from support.exported import assert_merges
from support.models import make_model
from support.processes import launch
from support.training_cases import assert_same, read, train
from transformers import AutoModelForCausalLM

from lemo_hf import LeMoConfig
from lemo_hf.core.checks import check_sharded_head

COMPILING = 900  # seconds

START = """
import os
from pathlib import Path
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.utils import safe_get_full_fp32_param
from support.deepspeed_cases import ALL, OFFLOADED, SAVED
from support.training_cases import make_trainer, write
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])

def run(name, stage, case, resume=None, offload=False, **more):
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # even the smallest is shared out
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **more}
    for size in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        config[size] = "auto"
    config["train_micro_batch_size_per_gpu"] = "auto"
    unset_hf_deepspeed_config()  # the last case's; with it the model would be made in parts
    trainer = make_trainer(folder / name, deepspeed=config, **case)
    trainer.train(resume and str(resume))
    assert trainer.accelerator.distributed_type == "DEEPSPEED"
    trained = [pair for pair in trainer.model.named_parameters() if pair[1].requires_grad]
    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in trained}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    write(folder, name, (losses, weights), process)
    return trainer
"""
TRAIN = (
    START
    + """
for name, (stage, case) in ALL.items():
    run(name, stage, case)
for name, (stage, case) in SAVED.items():
    run(name, stage, case).save_model(folder / name / "final")
    run(f"again-{name}", stage, case, folder / name / "checkpoint-2")
"""
)
ALONE = (
    START
    + """
from deepspeed.checkpoint import ds_to_universal
for name, (stage, case) in SAVED.items():
    checkpoint = folder / name / "checkpoint-2"
    try:
        run(f"refused-{name}", stage, case, checkpoint)
    except Exception as error:
        (folder / f"{name}.refused").write_text(str(error))
    sys.argv = ["", "--input_folder", str(checkpoint / "global_step2")]
    sys.argv += ["--output_folder", str(checkpoint / "global_step2_universal")]
    sys.argv += ["--inject_missing_state"]  # pipelines leave it in checkpoints, Trainer does not
    ds_to_universal.main(ds_to_universal.parse_arguments())
    run(f"alone-{name}", stage, case, checkpoint, checkpoint={"load_universal": True})
"""
)
OFFLOAD = (
    START
    + """
from deepspeed.ops.adam import DeepSpeedCPUAdam
for name, (stage, case) in OFFLOADED.items():
    inner = run(name, stage, case, offload=True).deepspeed.optimizer.optimizer
    assert isinstance(inner, DeepSpeedCPUAdam), inner
"""
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with what two processes made of all cases, and one of their checkpoints."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    launch(TRAIN, folder, [2], COMPILING)
    launch(ALONE, folder, [1], COMPILING)
    return folder


@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one(two, tmp_path, name):
    assert_same(read(two, name), train(tmp_path, **ALL[name][1]))


@pytest.mark.parametrize("name", SAVED)
def test_the_same_and_another_number_of_processes_resume(two, tmp_path, name):
    """Another number by way of DeepSpeed's universal checkpoint; it refuses its usual one."""
    uninterrupted = train(tmp_path, **SAVED[name][1])
    for made in (name, f"again-{name}"):
        assert_same(read(two, made), uninterrupted)
    # From a universal checkpoint ZeRO-3 gives Adam's groups one step tensor, which each advances
    # (deepspeed 0.19.8, runtime/zero/stage3.py, line 3681). LoRA is one group, this is two.
    tolerance = 1e-3 if name == "saved-zero3-full" else 1e-5
    assert_same(read(two, f"alone-{name}"), uninterrupted, tolerance)
    assert "DP world size of 2 but the current world size is 1" in (
        (two / f"{name}.refused").read_text()
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_merges_on_one_process(two, tmp_path, lemo, stage):
    name = f"saved-zero{stage}-lora"
    assert_merges(lemo, two / name / "final", read(two, name)[1], tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_gathered_weights_load_without_lemo(two, stage):
    final = two / f"saved-zero{stage}-full" / "final"
    loaded = AutoModelForCausalLM.from_pretrained(final)
    for name, tensor in read(two, f"saved-zero{stage}-full")[1].items():
        assert torch.equal(loaded.get_parameter(name), tensor), name
    assert LeMoConfig.from_pretrained(final) == LeMoConfig(block_size=8, segment_size=16, **EACH)


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory):
    """A folder with what two processes made of the cases whose optimizer is offloaded."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("offloaded")
    launch(OFFLOAD, folder, [2], COMPILING)
    return folder


@pytest.mark.parametrize("name", OFFLOADED)
def test_an_offloaded_optimizer_trains_as_adamw(offloaded, tmp_path, name):
    assert_same(read(offloaded, name), train(tmp_path, **OFFLOADED[name][1]))


def test_a_head_of_several_modules_is_refused_under_zero_3():
    head = make_model("llama").lm_head
    check_sharded_head(head)
    inside = torch.nn.Sequential(head)
    check_sharded_head(inside)
    head.weight.ds_id = 0  # the mark of a parameter that ZeRO-3 holds in parts
    check_sharded_head(head)
    with pytest.raises(ValueError, match="Sequential with modules inside.*ZeRO-3"):
        check_sharded_head(inside)
