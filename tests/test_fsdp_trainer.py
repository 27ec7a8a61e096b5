"""FSDP2 by accelerate: two processes that share one model train as one process does."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import merge_fsdp_weights
from exported import assert_merges
from models import make_model
from processes import ROOT, launch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from training_cases import CHECKPOINTED, ROWS_A_STEP, assert_same, padded, read, rows, train, whole
from transformers import AutoModelForCausalLM

from lemo_hf import LeMoConfig, apply_lemo

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
    for what in ("lora", "full")
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

START = """
import os
from pathlib import Path
from lemo_hf.memory.fitting import local_bytes
from test_fsdp_trainer import ALL, SAVED, one_pass
from training_cases import make_trainer, outcome, train, write
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])

def sharded(kind="FULL", **case):
    config = {"version": 2, "reshard_after_forward": True, "state_dict_type": f"{kind}_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": config, **case}

def kind_of(trainer):
    return trainer.accelerator.state.fsdp_plugin.state_dict_type.name.removesuffix("_STATE_DICT")
"""
TRAIN = (
    START
    + """
for name, case in ALL.items():
    trainer = make_trainer(folder / name, **sharded(**case))
    trainer.train()
    assert trainer.accelerator.is_fsdp2, trainer.accelerator.distributed_type
    assert type(trainer.model.get_output_embeddings()).__name__.startswith("FSDP")
    parameters = list(trainer.model.parameters())  # of which a process counts its half
    assert sum(map(local_bytes, parameters)) < 0.6 * sum(p.nbytes for p in parameters)
    write(folder, name, outcome(trainer), process)
bf16 = sharded(**{**ALL["full-answers"], "bf16": True})
write(folder, "bf16", train(folder / "bf16", **bf16), process)
for name, case in SAVED.items():
    trainer = make_trainer(folder / name, **sharded(**case))
    trainer.train()
    assert kind_of(trainer) == case["kind"]
    if name == "SHARDED-lora":  # Trainer saves no model while the kind is SHARDED
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(folder / name / "final")
    write(folder, name, outcome(trainer), process)
    again = make_trainer(folder / f"again-{name}", **sharded(**case))
    again.train(str(folder / name / "checkpoint-2"))
    write(folder, f"again-{name}", outcome(again), process)
write(folder, "linears", one_pass(process), process)
write(folder, "linears_checkpointed", one_pass(process, checkpointed=True), process)
own = sharded(**ALL["full-pooled"])
own["fsdp_config"]["activation_checkpointing"] = True
try:
    make_trainer(folder / "own", **own)
except ValueError as error:
    (folder / "refused").write_text(str(error))
"""
)
ALONE = (
    START
    + """
for name, case in SAVED.items():
    again = train(folder / f"alone-{name}", str(folder / name / "checkpoint-2"), **sharded(**case))
    write(folder, f"alone-{name}", again, process)
"""
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with what two processes made of all cases, and one of their checkpoints."""
    folder = tmp_path_factory.mktemp("fsdp")
    launch(TRAIN, folder, [2])
    launch(ALONE, folder, [1])
    return folder


@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one(two, tmp_path, name):
    assert_same(read(two, name), train(tmp_path, **ALL[name]))


def test_units_within_a_layer(two):
    """Their calls gather, so processes make the same calls, with nothing to choose as well."""
    for made in ("linears", "linears_checkpointed"):
        assert_same(read(two, made), one_pass())


def test_mixed_precision(two):
    """bf16 computes, fp32 learns: the losses are those of fp32 up to bf16's rounding."""
    mixed, plain = read(two, "bf16"), read(two, "full-answers")
    assert mixed[0] == pytest.approx(plain[0], rel=2e-2) and mixed[0] != plain[0]
    assert {tensor.dtype for tensor in mixed[1].values()} == {torch.float32}


@pytest.mark.parametrize("name", SAVED)
def test_the_same_and_another_number_of_processes_resume(two, tmp_path, name):
    case = {key: value for key, value in SAVED[name].items() if key != "kind"}
    uninterrupted = train(tmp_path, **case)
    for made in (name, f"again-{name}", f"alone-{name}"):
        assert_same(read(two, made), uninterrupted)


def test_a_full_state_dict_loads_without_lemo(two):
    final = two / "FULL-full" / "final"
    loaded = AutoModelForCausalLM.from_pretrained(final)
    for name, tensor in read(two, "FULL-full")[1].items():
        assert torch.equal(loaded.get_parameter(name), tensor), name
    config = LeMoConfig.from_pretrained(final)
    assert config == LeMoConfig(block_size=8, segment_size=16, **EACH)
    assert LeMoConfig.from_pretrained(two / "SHARDED-lora" / "checkpoint-2") == config


@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_an_adapter_merges_on_one_process(two, tmp_path, lemo, kind):
    name = f"{kind}-lora"
    assert_merges(lemo, two / name / "final", read(two, name)[1], tmp_path)


def test_a_sharded_state_dict_becomes_one_file(two, tmp_path):
    """As `accelerate merge-weights` makes it."""
    shards = two / "SHARDED-full" / "checkpoint-4" / "pytorch_model_fsdp_0"
    merge_fsdp_weights(str(shards), str(tmp_path))
    merged = load_file(tmp_path / "model.safetensors")
    trained = read(two, "SHARDED-full")[1]
    assert merged.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(merged[name], tensor), name


def test_fsdps_own_checkpointing_is_refused(two):
    refused = (two / "refused").read_text()
    assert "fsdp_activation_checkpointing=True" in refused
    assert "gradient_checkpointing=True" in refused


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")))
def test_example_configs_are_accelerates(path: Path):
    """Its own loader refuses keys it does not know."""
    config = load_config_from_file(str(path))
    assert config.num_processes == 2 and config.mixed_precision == "bf16"
    kind, _, stage = path.stem.partition("_zero")
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[kind]
    assert config.distributed_type == expected
    if stage:
        assert config.deepspeed_config["zero_stage"] == int(stage)
    if kind == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_activation_checkpointing"]
