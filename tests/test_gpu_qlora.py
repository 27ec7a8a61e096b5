"""QLoRA and LoftQ on a GPU: bitsandbytes' kernels, PEFT's preparation, both Trainers."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import (
    LoftQConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    replace_lora_weights_loftq,
)
from support.models import make_model
from support.paths import DEMO
from support.trainers import adapter, losses, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer

from lemo_hf import LeMoConfig, remove_lemo

pytestmark = pytest.mark.gpu
bitsandbytes = pytest.importorskip("bitsandbytes")

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
KINDS = {"nf4": NF4, "int8": {"load_in_8bit": True}}
FULL = LeMoConfig(retention=1.0, block_size=8, segment_size=40)
HALF = LeMoConfig(retention=0.5, block_size=8, policy="random", segment_size=40)
UNSCALED = {"lora_alpha": 8}  # LoftQ's B A is what rounding took away: r / lora_alpha must be 1
# What products round to 16 bits: one unit of bf16. The sums behind them are fp32 in both.
ONE_ROUNDING = 2**-8
WAYS = {
    "stored": (HALF, {}),
    "checkpointing": (HALF, {"gradient_checkpointing": True}),
    "offload": (
        replace(HALF, offload_gib=1.0),
        {"gradient_checkpointing": True},
    ),
    "mlp": (replace(HALF, recompute="mlp"), {}),
}


@pytest.fixture
def device():
    return torch.device("cuda")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """bf16 weights of a model whose linears are whole blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    make_model("llama", **sizes).bfloat16().save_pretrained(folder)
    return folder


def quantized(checkpoint, kind, device):
    """The base, quantised where it runs."""
    return AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=BitsAndBytesConfig(**KINDS[kind]),
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": device.type},
    )


def lora(**options):
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **options}
    return LoraConfig(**settings, task_type="CAUSAL_LM")


def prepared(checkpoint, kind, device, **options):
    """As the QLoRA example makes it."""
    model = prepare_model_for_kbit_training(
        quantized(checkpoint, kind, device), use_gradient_checkpointing=False
    )
    torch.manual_seed(5)
    return get_peft_model(model, lora(**options))


def trainer_of(tmp_path, model, config, device, **arguments):
    settings = {"bf16": True, "use_cpu": device.type == "cpu", "max_steps": 6}
    if config is None:
        return make_trainer(tmp_path, None, cls=Trainer, model=model, **{**settings, **arguments})
    return make_trainer(tmp_path, config, model=model, **{**settings, **arguments})


def frozen(model):
    """Everything that must stay as it is, quantised weights in their bytes."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def linears(model):
    names = ("Linear4bit", "Linear8bitLt")
    own = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
    assert {type(m).__name__ for m in own} <= set(names)
    return own


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_retention_1_trains_as_trainer_does(checkpoint, kind, checkpointing, device, tmp_path):
    own = {"gradient_checkpointing": checkpointing}
    plain = trainer_of(tmp_path, prepared(checkpoint, kind, device), None, device, **own)
    ours = trainer_of(tmp_path, prepared(checkpoint, kind, device), FULL, device, **own)
    expected = losses(plain)
    assert len(linears(ours.model)) == 7 * 4
    assert losses(ours) == pytest.approx(expected, rel=ONE_ROUNDING)
    assert expected[-1] != pytest.approx(expected[0], rel=4 * ONE_ROUNDING)  # it trained


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_tokens_train_the_adapters_alone(checkpoint, kind, way, device, tmp_path):
    config, arguments = WAYS[way]
    model = prepared(checkpoint, kind, device)
    before, names = frozen(model), {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    rows = [{"input_ids": list(range(3, 67)), "labels": list(range(3, 67))}] * 24
    trainer = trainer_of(tmp_path, model, config, device, data=rows, max_steps=10, **arguments)
    found = losses(trainer)
    assert all(map(torch.isfinite, torch.tensor(found)))
    assert found[-1] < 0.9 * found[0]
    shares = [log["lemo/attention_retention"] for log in trainer.state.log_history if "loss" in log]
    assert all(0.5 <= share < 0.6 for share in shares)
    assert all(torch.equal(value, frozen(model)[name]) for name, value in before.items())
    assert all(not torch.equal(value, start[name]) for name, value in adapter(trainer).items())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_load_over_the_quantised_base(checkpoint, kind, device, tmp_path):
    trainer = trainer_of(tmp_path, prepared(checkpoint, kind, device), HALF, device)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    base = prepare_model_for_kbit_training(
        quantized(checkpoint, kind, device), use_gradient_checkpointing=False
    )
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(3, 60, device=device)[None]
    assert torch.equal(logits(trainer.model, ids), logits(again, ids))


def logits(model, ids):
    """Under autocast, which Trainer leaves on a model that it has trained."""
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_the_quantised_base_it_is_the_model_but_for_rounding(
    checkpoint, kind, device, tmp_path
):
    """PEFT rounds the sum to the base's bits again, which costs what rounding the base did."""
    trainer = trainer_of(tmp_path, prepared(checkpoint, kind, device), HALF, device)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    ids = torch.arange(3, 60, device=device)[None]
    expected = logits(trainer.model, ids)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    rounded = (logits(quantized(checkpoint, kind, device), ids) - logits(exact, ids)).norm()
    adapted = PeftModel.from_pretrained(quantized(checkpoint, kind, device), tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    assert len(linears(merged)) == 7 * 4
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert (logits(merged, ids) - expected).norm() < 2 * rounded


def test_lemo_merge_takes_the_16_bit_base(checkpoint, device, tmp_path, lemo, monkeypatch):
    """The way out of that rounding: an adapter does not know that its base was quantised."""
    trainer = trainer_of(tmp_path, prepared(checkpoint, "nf4", device), HALF, device)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    code, out, err = lemo(
        "merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--json"
    )
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["base"] == str(checkpoint)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not linears(merged) and merged.dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(exact, tmp_path / "adapter")
    for name, layer in adapters_of(adapted):
        base, delta = layer.base_layer.weight.double(), layer.get_delta_weight("default").double()
        off = merged.get_submodule(name).weight.double() - base - delta
        assert off.norm() < ONE_ROUNDING * base.norm() < 0.5 * delta.norm()


def adapters_of(model):
    """Name in the base model, and module, of every linear with LoRA."""
    base = model.get_base_model()
    return [(n, m) for n, m in base.named_modules() if hasattr(m, "get_delta_weight")]


def test_loftq_starts_nearer_to_the_base_and_trains(checkpoint, device, tmp_path):
    """PEFT's two steps: the start from 16-bit weights, then the adapter over a 4-bit base."""
    pytest.importorskip("scipy")
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    start = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    config = lora(**start, **UNSCALED)
    started = get_peft_model(copy.deepcopy(exact), config)
    started.peft_config["default"].init_lora_weights = True  # or loading would start again
    started.save_pretrained(tmp_path / "start")
    started.unload().save_pretrained(tmp_path / "base")

    base = prepare_model_for_kbit_training(
        quantized(tmp_path / "base", "nf4", device), use_gradient_checkpointing=False
    )
    model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    plain = prepared(checkpoint, "nf4", device)  # B is 0
    assert distance(model, exact) < 0.95 * distance(plain, exact)
    assert_trains_like_the_stock_stack(model, device, tmp_path)


@torch.no_grad()
def distance(model, exact):
    """Of the adapted 4-bit linears from the 16-bit ones, over all of them."""
    squares = []
    for name, layer in adapters_of(model):
        weight = layer.base_layer.weight
        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        off = weight + layer.get_delta_weight("default") - exact.get_submodule(name).weight
        squares.append(off.square().sum().item())
    assert len(squares) == 7 * 4
    return sum(squares) ** 0.5


def test_loftq_weights_put_into_a_quantised_model(checkpoint, device, tmp_path):
    model = prepared(checkpoint, "nf4", device, **UNSCALED)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
    before = distance(model, exact)  # B is 0
    replace_lora_weights_loftq(model, str(checkpoint / "model.safetensors"))
    assert distance(model, exact) < 0.95 * before
    assert_trains_like_the_stock_stack(model, device, tmp_path)


def assert_trains_like_the_stock_stack(model, device, tmp_path):
    """At retention 1; then on with half of the tokens."""
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    expected = losses(trainer_of(tmp_path, model, None, device))
    with torch.no_grad():
        for name, value in start.items():
            model.get_parameter(name).copy_(value)
    found = losses(trainer_of(tmp_path, model, FULL, device))
    assert found == pytest.approx(expected, rel=ONE_ROUNDING)
    remove_lemo(model)
    half = losses(trainer_of(tmp_path, model, HALF, device))
    assert all(map(torch.isfinite, torch.tensor(half)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_without_adapters_is_refused(checkpoint, kind, device, tmp_path):
    """transformers' own message, which names PEFT as the way out, before a step is taken."""
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer_of(tmp_path, quantized(checkpoint, kind, device), HALF, device)
