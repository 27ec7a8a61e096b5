"""Language models inside multimodal ones, on batches of text; test_images.py has images."""

import pytest
import torch
from support.batches import compare, left_padded, packed
from support.models import batch, loss_and_gradients, with_lora
from support.multimodal import PARTS, assert_stock, multimodal

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.families import MULTIMODAL, family_of


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
        assert_stock((found, gradients), (loss, expected), bound=2e-5)


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


def test_a_language_model_without_a_row_says_why():
    config = multimodal("llava").config
    config.text_config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba' is not supported: .*pass a state"):
        family_of(config)
