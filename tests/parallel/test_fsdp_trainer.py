"""FSDP2 by accelerate: two processes that share one model train as one process does."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from support.exported import assert_merges
from support.fsdp_cases import ALL, EACH, SAVED, one_pass
from support.paths import ROOT
from support.processes import launch
from support.training_cases import again, assert_same, make_trainer, outcome, read, train
from transformers import AutoModelForCausalLM

from lemo_hf import LeMoConfig
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.memory.out_of_memory import CHECKPOINTING

START = """
import os
from pathlib import Path
from lemo_hf.memory.fitting import local_bytes

from support.fsdp_cases import ALL, SAVED, one_pass
from support.training_cases import make_trainer, outcome, train, write
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


BLOCKS = {"block_size": 8, "segment_size": 16}
SHORT = (
    START
    + """
from lemo_hf import LeMoConfig
from lemo_hf.integrations.callback import LeMoCallback
from support.training_cases import again
BLOCKS = {"block_size": 8, "segment_size": 16}
case = ALL["lora-answers"]
trainer = make_trainer(folder / "short", **sharded(**case))
trainer.train()
assert trainer.accelerator.is_fsdp2
write(folder, "short", outcome(trainer), process)
write(folder, "sparser", again(trainer, lemo_config=LeMoConfig(retention=0.25, **BLOCKS)), process)
callback = LeMoCallback(LeMoConfig(retention=0.5, **BLOCKS))
write(folder, "called", again(trainer, callbacks=[callback]), process)
write(folder, "dense", again(trainer), process)
assert "SparseLayer" not in {x.__name__ for x in type(trainer.lemo._layers[0]).__mro__}
"""
)


def test_two_processes_train_an_adapter_as_one(tmp_path):
    """And then once more with another config, by a callback, and dense."""
    launch(SHORT, tmp_path, [2])
    trainer = make_trainer(tmp_path / "one", **ALL["lora-answers"])
    trainer.train()
    assert_same(read(tmp_path, "short"), outcome(trainer))
    sparser, half = (LeMoConfig(retention=share, **BLOCKS) for share in (0.25, 0.5))
    assert_same(read(tmp_path, "sparser"), again(trainer, lemo_config=sparser))
    assert_same(read(tmp_path, "called"), again(trainer, callbacks=[LeMoCallback(half)]))
    assert_same(read(tmp_path, "dense"), again(trainer))


@pytest.mark.soak
@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one(two, tmp_path, name):
    assert_same(read(two, name), train(tmp_path, **ALL[name]))


@pytest.mark.soak
def test_units_within_a_layer(two):
    """Their calls gather, so processes make the same calls, with nothing to choose as well."""
    for made in ("linears", "linears_checkpointed"):
        assert_same(read(two, made), one_pass())


@pytest.mark.soak
def test_mixed_precision(two):
    """bf16 computes, fp32 learns: the losses are those of fp32 up to bf16's rounding."""
    mixed, plain = read(two, "bf16"), read(two, "full-answers")
    assert mixed[0] == pytest.approx(plain[0], rel=2e-2) and mixed[0] != plain[0]
    assert {tensor.dtype for tensor in mixed[1].values()} == {torch.float32}


@pytest.mark.soak
@pytest.mark.parametrize("name", SAVED)
def test_the_same_and_another_number_of_processes_resume(two, tmp_path, name):
    case = {key: value for key, value in SAVED[name].items() if key != "kind"}
    uninterrupted = train(tmp_path, **case)
    for made in (name, f"again-{name}", f"alone-{name}"):
        assert_same(read(two, made), uninterrupted)


@pytest.mark.soak
def test_a_full_state_dict_loads_without_lemo(two):
    final = two / "FULL-full" / "final"
    loaded = AutoModelForCausalLM.from_pretrained(final)
    for name, tensor in read(two, "FULL-full")[1].items():
        assert torch.equal(loaded.get_parameter(name), tensor), name
    config = LeMoConfig.from_pretrained(final)
    assert config == LeMoConfig(block_size=8, segment_size=16, **EACH)
    assert LeMoConfig.from_pretrained(two / "SHARDED-lora" / "checkpoint-2") == config


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_an_adapter_merges_on_one_process(two, tmp_path, lemo, kind):
    name = f"{kind}-lora"
    assert_merges(lemo, two / name / "final", read(two, name)[1], tmp_path)


@pytest.mark.soak
def test_a_sharded_state_dict_becomes_one_file(two, tmp_path):
    """As `accelerate merge-weights` makes it."""
    shards = two / "SHARDED-full" / "checkpoint-4" / "pytorch_model_fsdp_0"
    merge_fsdp_weights(str(shards), str(tmp_path))
    merged = load_file(tmp_path / "model.safetensors")
    trained = read(two, "SHARDED-full")[1]
    assert merged.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(merged[name], tensor), name


@pytest.mark.soak
def test_fsdps_own_checkpointing_is_refused(two):
    refused = (two / "refused").read_text()
    assert "fsdp_activation_checkpointing=True" in refused
    assert f"TrainingArguments({CHECKPOINTING}=True)" in refused


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
