"""The presets of `lemo train`: each trains, and is right for the model that it names."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from support.paths import DEMO, ROOT
from support.plans import plans
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.cli.train_settings import PRESETS, find_config, read_settings
from lemo_hf.planning.plan import GIB

MODEL = str(DEMO / "model")
TEXT = (DEMO / "text" / "train-alice-adams.txt").read_text()[:16_000]
PRESET_NAMES = sorted({path.stem for path in PRESETS.glob("*.yaml")} - {"card"})
# As published: meta-llama/Llama-3.1-8B and Qwen/Qwen3-8B-Base.
SHARED = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
LLAMA31_8B = LlamaConfig(
    **SHARED,
    num_hidden_layers=32,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
QWEN3_8B = Qwen3Config(
    **SHARED,
    num_hidden_layers=36,
    intermediate_size=12288,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_presets_train(preset, lemo, tmp_path, monkeypatch):
    """As they stand but for model, text and sizes: checkpointing, offload and bf16 are theirs."""
    monkeypatch.chdir(ROOT)  # where the demo's paths begin
    (tmp_path / "book.txt").write_text(TEXT)
    sizes = ("--tokens", 512, "--training.max_steps", 2, "--training.logging_steps", 1)
    sizes = (*sizes, "--training.gradient_accumulation_steps", 2, "--training.use_cpu", "true")
    given = ("--model", MODEL, "--dataset", tmp_path / "book.txt", "--output", tmp_path / "out")
    code, out, err = lemo("train", "--config", preset, *given, *sizes, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 2 and len(result["losses"]) == 2
    assert all(1 < loss < 6 for loss in result["losses"])  # ln of the vocabulary's size is 6.9
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = [bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name]
    assert moved and all(moved) and all(tensor.isfinite().all() for tensor in adapter.values())
    asked = read_settings(preset, ["--training.use_cpu", "true"]).build()
    saved = LeMoConfig.from_pretrained(tmp_path / "out")
    assert dataclasses.replace(saved, predictor=asked.lemo.predictor) == asked.lemo


def published(preset):
    """The config a preset's model has, its parameters, and GiB of the card the docs say it fits."""
    if preset == "demo-cpu":
        return AutoConfig.from_pretrained(MODEL), 1_862_272, None
    if preset == "qwen3-8b-32k":
        return QWEN3_8B, 8_190_735_360, None
    cards = {"llama3-8b-24gib": 24, "llama3-8b-64k": 80}
    return LLAMA31_8B, 8_030_261_248, cards[preset]


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=() if name == "llama3-8b-24gib" else pytest.mark.soak)
        for name in PRESET_NAMES
    ],
)
def test_presets_fit_their_model(preset, monkeypatch):
    """Of the real shapes, without memory: LoRA and LeMo go on, and the plan says what fits."""
    monkeypatch.chdir(ROOT)
    run = read_settings(preset, ["--training.use_cpu", "true"]).build()
    model_config, parameters, card = published(preset)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    assert model.num_parameters() == parameters
    model = get_peft_model(model, run.lora)
    sparse = apply_lemo(model, run.lemo).sparse_layers
    assert sparse == list(range(run.lemo.dense_first_layers, model_config.num_hidden_layers))
    assert model.get_nb_trainable_parameters()[0] > 0
    assert run.training.max_steps > 0 and run.training.output_dir == f"out/{preset}"
    assert run.data.tokens <= model_config.max_position_embeddings or run.model.rope_type
    assert run.data.tokens % run.lemo.block_size == 0
    found = plans(
        model_config,
        run.lemo,
        run.data.tokens,
        batch_size=run.training.per_device_train_batch_size,
        lora_rank=run.lora.r,
        lora_targets=run.lora.target_modules,
        dtype=run.model.dtype,
        autocast=run.training.bf16,
        gradient_checkpointing=run.training.gradient_checkpointing,
        memory_gib=card,
        reserve_gib=2.0,
    )
    for phase in found.values():
        assert phase.pinned <= (run.lemo.offload_gib or 0) * GIB
        assert card is None or phase.fits(card - 2)


def test_a_local_file_comes_before_a_preset(tmp_path, monkeypatch):
    assert find_config("llama3-8b-64k").parent == PRESETS
    monkeypatch.chdir(tmp_path)
    Path("llama3-8b-64k.yaml").write_text("full: true")
    assert find_config("llama3-8b-64k.yaml") == Path("llama3-8b-64k.yaml")


def test_the_repositorys_preset_elsewhere(lemo, tmp_path, monkeypatch):
    """Its paths begin in the repository: elsewhere this is said, with what to give instead."""
    monkeypatch.chdir(tmp_path)
    code, out, err = lemo("train", "--config", "demo-cpu", "--dry-run")
    assert code == 2 and "mistakes" not in err and not out
    assert "--config demo-cpu is for the repository's own model and texts" in err
    assert "examples/demo/predictor are not here: start it in the root of a checkout" in err
    (tmp_path / "book.txt").write_text(TEXT)
    given = ("--model", MODEL, "--dataset", "book.txt", "--data.eval_dataset", "null")
    code, _, err = lemo("train", "--config", "demo-cpu", "--dry-run", *given)
    assert code == 2 and err.count("examples/demo") == 1
    assert "predictor is not here" in err and "your own: --lemo.config NAME, or null." in err
    for none in (("--lemo.config", "null"), ("--dense",)):
        code, out, err = lemo("train", "--config", "demo-cpu", "--dry-run", *given, *none)
        assert code == 0 and "tokens: 1024" in out, err
