"""The memory plan of quantised weights: every byte of real ones, and allocations of tiny steps."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from support.allocations import LLAMA, QKVO, peak_of_a_step, tiny
from support.plans import longest, plan
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.config import LEVELS
from lemo_hf.planning.dry_step import UNIT

pytest.importorskip("bitsandbytes")

NF4 = {"load_in_4bit": True}
INT8 = {"load_in_8bit": True}
DOUBLE = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


def quantized(folder, family, kind, kbit_training, **sizes):
    """A tiny model that bitsandbytes has quantised on the CPU, and its config before that."""
    model, config, _ = tiny(family, targets=None, **sizes)
    model.save_pretrained(folder)
    settings = kind | (DOUBLE if kind == NF4 else {})
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**settings),
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map="cpu",
    )
    if kbit_training:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model, config


def constants(model):
    """Tensors beside the quantised weights: scales, their scales and mean, tables."""
    found = []
    for module in model.modules():
        if not type(module).__module__.startswith("bitsandbytes"):
            continue
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            found.append(module.weight.SCB)
            continue
        nested = state.state2
        found += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
    return found


@pytest.mark.parametrize("kbit_training", [True, False])
@pytest.mark.parametrize("kind", [NF4, INT8], ids=["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_weights_to_the_byte(family, kind, kbit_training, tmp_path):
    for options in ({"intermediate_size": 416, "tie_word_embeddings": True},):
        model, config = quantized(tmp_path, family, kind, kbit_training, **options)
        own = constants(model)
        quantised = [p for p in model.parameters() if not p.is_floating_point()]
        assert len(quantised) == 3 * (4 if family == "phi3" else 7)
        settings = {"kbit_training": kbit_training, "lora_targets": "all-linear", **kind}
        parts = plan(config, None, 64, **settings).parts
        assert parts["quantised weights"] == sum(x.nbytes for x in (*quantised, *own))
        rest = [p for p in model.parameters() if p.is_floating_point()]
        assert parts["weights"] == sum(p.nbytes for p in rest)


WAYS = [
    *({"retention": 0.5, "recompute": level} for level in LEVELS),
    None,
    "checkpointing",
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    ("kbit_training", "adapter_dtype", "autocast", "targets"),
    [(True, "float32", True, "all-linear"), (False, "bfloat16", False, QKVO)],
)
def test_every_allocation_of_a_4_bit_step(
    kbit_training,
    adapter_dtype,
    autocast,
    targets,
    way,
    tmp_path,
    launched,
    monkeypatch,
):
    # PEFT's quantised linears ask about the GPU's autocast alone.
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: asked(*(kind or ("cpu",))))
    model, config = quantized(tmp_path, "llama", NF4, kbit_training)
    own = constants(model)
    adapters = LoraConfig(r=8, target_modules=targets if targets == "all-linear" else [*targets])
    wide = adapter_dtype == "float32"
    model = get_peft_model(model, adapters, autocast_adapter_dtype=wide).train()
    lemo, checkpointing, tokens = None, way == "checkpointing", 1024
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif way is not None:
        lemo = LeMoConfig(policy="recent", block_size=16, **way)
        apply_lemo(model, lemo)
    peak = peak_of_a_step(model, 1, tokens, autocast, own)
    expected = plan(
        config,
        lemo,
        tokens,
        lora_targets=targets,
        adapter_dtype=adapter_dtype,
        autocast=autocast,
        kbit_training=kbit_training,
        gradient_checkpointing=checkpointing,
        **NF4,
    )
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    parts = expected.parts
    assert parts["optimizer states"] == 2 * trained
    always = ("weights", "quantised weights", "optimizer states", "cuBLAS workspaces")
    planned = expected.peak - trained - sum(parts[name] for name in always)
    # Transformers' layers hold fp32 copies for shorter than the plan has it.
    within = 0.02 if lemo is not None else 0.07
    assert planned == pytest.approx(peak, rel=within)


def test_8_bit_linears_hold_their_inputs_past_a_checkpoint():
    """Of hidden and query width in LeMo's units, where the MLP runs without a graph."""
    settings = {"gradient_checkpointing": True, "kbit_training": False, "autocast": False}
    settings |= {"adapter_dtype": "bfloat16"}
    lemo = LeMoConfig(retention=0.5, recompute="full")
    stored = [
        sum(plan(LLAMA, lemo, 8192, **kind, **settings).parts.get(name, 0) for name in UNIT)
        for kind in (INT8, NF4)
    ]
    assert stored[0] - stored[1] == pytest.approx(32 * 4096 * 2 * 4096 * 2, rel=0.02)


@pytest.mark.soak
def test_fewer_bits_leave_room_for_longer_rows():
    lemo = LeMoConfig(recompute="full", offload_gib=100)
    plain, narrow = longest(LLAMA, lemo, 24), longest(LLAMA, lemo, 24, kbit_training=False, **NF4)
    assert 0 < plain < narrow
    assert longest(LLAMA, lemo, 24, **NF4) < narrow  # an fp32 stream


@pytest.mark.parametrize(
    ("flag", "kind", "more"),
    [
        ("--load-in-4bit", NF4, ()),
        pytest.param("--load-in-8bit", INT8, ("--no-kbit-training",), marks=pytest.mark.soak),
    ],
)
def test_the_command_line(lemo, tmp_path, flag, kind, more):
    LLAMA.save_pretrained(tmp_path)
    options = ("plan", "--model", tmp_path, "--tokens", 8192, "--json")
    code, out, err = lemo(*options, flag, *more)
    assert code == 0, err
    expected = plan(LLAMA, LeMoConfig(), 8192, kbit_training=not more, **kind)
    assert json.loads(out)["LeMo"]["parts"] == expected.parts
    code, _, err = lemo(*options, "--load-in-4bit", "--load-in-8bit")
    assert code == 2 and "exclude each other" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**NF4, **INT8}, "load_in_4bit and load_in_8bit exclude each other"),
        ({**NF4, "lora_rank": None}, "cannot be trained.*lora_rank"),
        ({**INT8, "dtype": "float32", "autocast": False}, "dtype='float32' of quantised"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(LLAMA, None, 1024, **settings)


def test_experts_that_peft_has_made_fp32_are_refused():
    config = tiny("mixtral")[1]
    with pytest.raises(ValueError, match="grouped product takes bf16 alone.*--no-kbit-training"):
        plan(config, None, 512, **NF4)
    assert plan(config, None, 512, kbit_training=False, **NF4).peak
