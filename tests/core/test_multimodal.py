"""Language models inside multimodal ones: text-only batches; images are refused."""

import pytest
import torch
from support.batches import compare, left_padded, packed
from support.models import (
    DELTA,
    EXPERTS_OF_QWEN,
    SIZES,
    batch,
    loss_and_gradients,
    relative_error,
    with_lora,
)
from transformers import AutoConfig, AutoModelForImageTextToText

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.families import MULTIMODAL, family_of

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
CLIP = {"model_type": "clip_vision_model", **VISION}
PARTS = {
    "gemma3": (
        {
            "model_type": "gemma3_text",
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
        {"model_type": "siglip_vision_model", **VISION},
        {"mm_tokens_per_image": 4, "image_token_id": 96},
    ),
    "llava": ({"model_type": "llama"}, CLIP, {"image_token_id": 96}),
    "llava-granite": (
        {"model_type": "granite", "residual_multiplier": 0.3, "logits_scaling": 2.0},
        CLIP,
        {"image_token_id": 96},
    ),
    "mistral3": (
        {"model_type": "mistral"},
        {"model_type": "pixtral", **VISION},
        {"image_token_id": 96},
    ),
    "qwen2_5_vl": ({"rope_parameters": MROPE}, QWEN, {}),
    "gemma4": (
        {
            "model_type": "gemma4_text",
            "layer_types": ["full_attention", "full_attention"],
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 6,
            "num_kv_shared_layers": 1,
        },
        {**VISION, "model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 2},
        {"image_token_id": 96, "audio_config": None},
    ),
    "qwen3_5": (
        {"layer_types": ["linear_attention", "full_attention"], **DELTA},
        QWEN,
        {},
    ),
    "qwen3_5_moe": (
        {"layer_types": ["linear_attention", "full_attention"], **DELTA, **EXPERTS_OF_QWEN},
        QWEN,
        {},
    ),
    "qwen3_vl": (
        {"rope_parameters": MROPE},
        {**QWEN, "deepstack_visual_indexes": [0]},
        {},
    ),
}


def multimodal(name, implementation="eager"):
    text, vision, more = PARTS[name]
    text = {**SIZES, "num_hidden_layers": 2, **text}
    settings = {"text_config": text, "vision_config": vision, **more}
    config = AutoConfig.for_model(name.partition("-")[0], **settings)
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.float().parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.6)
    return model.train()


def test_every_multimodal_type_is_here():
    assert {name.partition("-")[0] for name in PARTS} == set(MULTIMODAL)


@pytest.mark.parametrize("name", PARTS)
def test_retention_1_is_the_stock_model(name):
    """All parameters of the language model trained; padded rows, eager and sdpa."""
    model = multimodal(name)
    inputs = batch()
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, 45:] = 0
    inputs |= {"attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}
    loss, expected = loss_and_gradients(model, **inputs)
    for attention, recompute in (("eager", "none"), ("sdpa", "mlp"), ("sdpa", "full")):
        model.set_attn_implementation(attention)
        config = LeMoConfig(retention=1.0, block_size=16, segment_size=29, recompute=recompute)
        lemo = apply_lemo(model, config)
        found, gradients = loss_and_gradients(model, **inputs)
        assert lemo.report()["kept_tokens"] == 70 + 45
        remove_lemo(model)
        assert found == pytest.approx(loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        most = max(gradient.norm() for gradient in expected.values())
        for parameter, gradient in expected.items():
            if gradient.norm() > 1e-6 * most:
                assert relative_error(gradients[parameter], gradient) < 2e-5, parameter


@pytest.mark.parametrize("name", PARTS)
def test_half_is_the_masked_dense_model(name, monkeypatch):
    linears = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"
    model = with_lora(multimodal(name), target_modules=linears)
    config = LeMoConfig(
        retention=0.5,
        block_size=8,
        policy="random",
        agree_across_layers=name == "gemma4",
        segment_size=50,
    )
    for case in (left_padded, packed):
        if case is left_padded or name != "qwen2_5_vl":  # whose stock model knows no documents
            compare(model, case(), config, monkeypatch)


@pytest.mark.parametrize("name", PARTS)
def test_images_are_refused_while_training(name):
    model = multimodal(name)
    apply_lemo(model, LeMoConfig(block_size=16))
    with pytest.raises(ValueError, match="pixel_values: sparse passes of .* take text alone"):
        model(**batch(), pixel_values=torch.zeros(1, 3, 28, 28))
    marked = torch.ones(2, 70, dtype=torch.int64)
    with pytest.raises(ValueError, match="token_type_ids other than 0 mark images"):
        model(**batch(), token_type_ids=marked)
    places = torch.arange(70).expand(3, 2, -1)
    with pytest.raises(ValueError, match="position_ids of 3 dimensions"):
        model(**batch(), position_ids=places)


def test_a_language_model_without_a_row_says_why():
    config = multimodal("llava").config
    config.text_config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba' is not supported: .*pass a state"):
        family_of(config)
