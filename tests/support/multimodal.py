"""Tiny multimodal models, and batches with images for them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from support.models import DELTA, EXPERTS_OF_QWEN, SIZES, relative_error

IMAGE = 16  # tokens of an image, but of Mistral 3
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
QWEN = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IDS = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94}
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
        {"mm_tokens_per_image": IMAGE, "image_token_id": 96},
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
    "qwen2_5_vl": ({"rope_parameters": MROPE}, QWEN, IDS),
    "gemma4": (
        {
            "model_type": "gemma4_text",
            "layer_types": ["full_attention", "full_attention"],
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 6,
            "num_kv_shared_layers": 1,
        },
        {
            **VISION,
            "model_type": "gemma4_vision",
            "head_dim": 8,
            "num_key_value_heads": 2,
            "pooling_kernel_size": 2,
        },
        {"image_token_id": 96, "audio_config": None},
    ),
    "qwen3_5": (
        {"layer_types": ["linear_attention", "full_attention"], **DELTA},
        QWEN,
        IDS,
    ),
    "qwen3_5_moe": (
        {"layer_types": ["linear_attention", "full_attention"], **DELTA, **EXPERTS_OF_QWEN},
        QWEN,
        IDS,
    ),
    "qwen3_vl": (
        {"rope_parameters": MROPE},
        {**QWEN, "deepstack_visual_indexes": [0]},
        IDS,
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


def with_images(model, inputs, places):
    """``inputs`` with an image that begins at each of ``places``: (row, token), in order.

    Its tokens are those that the model's processor would write, and no labels.
    """
    config, kind = model.config, model.config.model_type
    ids, labels = inputs["input_ids"].clone(), inputs["labels"].clone()
    ids[ids >= 90] = 89
    written = [96] * IMAGE
    if kind == "mistral3":  # two lines of two, with breaks
        written = [96, 96, 93, 96, 96, 92]
    for row, start in places:
        ids[row, start : start + len(written)] = torch.tensor(written)
        labels[row, start : start + len(written)] = -100
    marks = (ids == 96).long()
    count = len(places)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 3, 56, 56, generator=generator)
    more = {"pixel_values": pixels}
    if kind == "gemma3":
        more["token_type_ids"] = marks
    elif kind == "gemma4":
        places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(1)
        more = {
            "pixel_values": torch.rand(count, 64, 3 * 14 * 14, generator=generator),
            "image_position_ids": places.expand(count, -1, -1),
            "mm_token_type_ids": marks,
        }
    elif kind == "mistral3":
        more["image_sizes"] = torch.tensor([[56, 56]] * count)
    elif kind.startswith("qwen"):
        grid = torch.tensor([[1, 8, 8]] * count)
        vision = config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        more = {
            "pixel_values": torch.randn(count * 64, width, generator=generator),
            "image_grid_thw": grid,
            "mm_token_type_ids": marks,
        }
    return {**inputs, "input_ids": ids, "labels": labels, **more}


def assert_stock(found, expected, bound):
    """Loss and gradients are the stock model's, but for gradients that are next to none."""
    (loss, gradients), (stock_loss, stock) = found, expected
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    assert gradients.keys() == stock.keys()
    most = max(gradient.norm() for gradient in stock.values())
    for name, gradient in stock.items():
        if gradient.norm() > 1e-6 * most:
            assert relative_error(gradients[name], gradient) < bound, name
