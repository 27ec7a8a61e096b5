"""Two processes push what they trained; FSDP2 takes the first one's weights."""

import pytest
import torch
from safetensors.torch import load
from support.hub_server import TOKEN, Hub
from support.models import make_model
from support.processes import start
from support.training_cases import assert_same, read

from lemo_hf.storage.files import CONFIG_NAME

START = """
import os
from pathlib import Path
import torch.distributed as dist
from support import training_cases
from support.training_cases import make_trainer, outcome, write
from transformers import AutoModelForCausalLM
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
"""
PUSH = (
    START
    + """
for name, engine in {"ddp": {}, "fsdp": FSDP}.items():
    trainer = make_trainer(
        folder / name, lora=True, push_to_hub=True, hub_model_id=f"me/{name}", **engine
    )
    trainer.train()
    trainer.push_to_hub()
    write(folder, name, outcome(trainer), process)
"""
)
LOAD = (
    START
    + """
import torch
made = training_cases.make_model

def loaded(*args, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.float32)
    if process > 0:  # whatever it holds, nobody is to read it
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    return model

dist.init_process_group("gloo")
for lora in (True, False):
    for name, make in {"all": made, "first": loaded}.items():
        efficient = name == "first"
        if efficient:
            os.environ["ACCELERATE_USE_FSDP"] = "true"
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
        training_cases.make_model = make
        config = {**FSDP["fsdp_config"], "cpu_ram_efficient_loading": efficient}
        trainer = make_trainer(folder / name, lora=lora, **{**FSDP, "fsdp_config": config})
        trainer.train()
        write(folder, f"{name}-{lora}", outcome(trainer), process)
        os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
"""
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    settings = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    with Hub() as server:
        for name, value in {**settings, "HF_ENDPOINT": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server


def run(script, folder):
    ended = start(script, folder, 2)
    assert ended.returncode == 0, ended.stderr[-6000:]


@pytest.mark.soak
def test_the_whole_adapter_is_pushed_once(hub, tmp_path):
    run(PUSH, tmp_path)
    for name in ("ddp", "fsdp"):
        files, commits = hub.files(f"me/{name}"), hub.repositories[f"me/{name}"].commits
        assert sum("adapter_model.safetensors" in made for made in commits.values()) == 1, commits
        assert {"adapter_config.json", "README.md", CONFIG_NAME} <= set(files)
        pushed = load(files["adapter_model.safetensors"])
        _, trained = read(tmp_path, name)
        assert len(pushed) == len(trained) > 0
        for key, weight in trained.items():
            key = key.replace(".default", "").removeprefix("module.").replace("_orig_mod.", "")
            torch.testing.assert_close(pushed[key], weight, rtol=0, atol=0)


@pytest.mark.soak
def test_the_first_process_alone_needs_weights(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "saved")
    run(LOAD, tmp_path)
    for lora in (True, False):
        assert_same(read(tmp_path, f"first-{lora}"), read(tmp_path, f"all-{lora}"), 1e-6)
