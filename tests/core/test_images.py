"""Batches with images: each image is kept whole or left out, and the rest is as with text."""

import pytest
import torch
from support.batches import compare
from support.dense_reference import recorded_sets
from support.models import batch, loss_and_gradients, with_lora
from support.multimodal import IMAGE, PARTS, assert_stock, multimodal, with_images
from support.trainers import losses, make_trainer
from transformers import Trainer

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo, remove_lemo

# Four images of the first row: two share a block, and the last ends in the first block with labels.
PLACES = [(0, 10), (0, 40), (0, 41 + IMAGE), (0, 91), (1, 20)]
LINEARS = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"


def with_pictures(model):
    """Two rows of 118 and 95 tokens, of which the last 12 have labels."""
    inputs = batch(tokens=118)
    mask = torch.ones(2, 118, dtype=torch.int64)
    mask[1, 95:] = 0
    inputs["labels"][0, :-12] = inputs["labels"][1, :83] = inputs["labels"][1, 95:] = -100
    return with_images(model, {**inputs, "attention_mask": mask}, PLACES)


@pytest.mark.parametrize("name", PARTS)
def test_retention_1_is_the_stock_model(name):
    model = multimodal(name)
    inputs = with_pictures(model)
    loss, expected = loss_and_gradients(model, **inputs)
    towers = [x for name, x in expected.items() if "visual." in name or "vision_tower." in name]
    assert any(gradient.any() for gradient in towers)
    for attention, recompute in (("eager", "full"), ("sdpa", "mlp")):
        model.set_attn_implementation(attention)
        apply_lemo(model, LeMoConfig(retention=1.0, block_size=8, recompute=recompute))
        found, gradients = loss_and_gradients(model, **inputs)
        remove_lemo(model)
        assert_stock((found, gradients), (loss, expected), bound=5e-5)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("policy", ["random", "auto"])
def test_half_is_the_masked_dense_model(name, policy, monkeypatch):
    model = with_lora(multimodal(name), target_modules=LINEARS)
    inputs = with_pictures(model)
    config = LeMoConfig(
        retention=0.5, block_size=8, policy=policy, agree_across_layers=name == "gemma4"
    )
    compare(model, inputs, config, monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [
        {"retention": 0.7, "policy": "random"},
        {"retention": 0.05, "policy": "random"},
        {"threshold": 1.0, "policy": "pooled"},
    ],
)
def test_an_image_is_kept_whole_or_left_out(settings, monkeypatch):
    model = multimodal("llava")
    inputs = with_pictures(model)
    seen = {(0, 10, 26): set(), (0, 40, 73): set(), (0, 91, 107): set(), (1, 20, 36): set()}
    for seed in range(12):
        config = LeMoConfig(**settings, block_size=4, seed=seed, agree_across_layers=False)
        apply_lemo(model, config)
        with recorded_sets(monkeypatch) as chosen:
            model(**inputs).loss.backward()
        remove_lemo(model)
        for _, mask in chosen:
            for (row, start, end), found in seen.items():
                part = mask[row, start:end]
                assert part.all() or not part.any()
                found.add(bool(part.all()))
    first, both, asked, other = seen.values()
    assert asked == {True}
    if settings.get("retention") == 0.7:
        assert first == both == other == {True, False}
    if settings.get("retention") == 0.05:  # what must be kept is more
        assert first == both == other == {False}


@pytest.mark.parametrize("retention", [1.0, 0.5])
def test_the_trainer_takes_images(retention, tmp_path):
    """With `remove_unused_columns` as it is by default, and losses that fall."""

    def make(cls):
        model = with_lora(multimodal("gemma3"), target_modules=LINEARS)
        inputs = with_images(model, batch(rows=4, tokens=64), [(row, 9) for row in range(4)])
        data = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
        config = LeMoConfig(retention=retention, block_size=8)
        return make_trainer(
            tmp_path, config, cls=cls, model=model, data=data, per_device_train_batch_size=4
        )

    ours = losses(make(LeMoTrainer))
    if retention == 1:
        assert ours == pytest.approx(losses(make(Trainer)), rel=1e-5)
    assert ours[-1] < ours[0]


def test_calls_whose_images_cannot_be_found_are_refused():
    model = multimodal("llava")
    apply_lemo(model, LeMoConfig(block_size=16))
    pixels = torch.zeros(1, 3, 56, 56)
    text = batch()
    embedded = model.get_input_embeddings()(text["input_ids"])
    with pytest.raises(ValueError, match="pixel_values: images are found among input_ids"):
        model(inputs_embeds=embedded, labels=text["labels"], pixel_values=pixels)
    with pytest.raises(ValueError, match="token types other than 0 .*leave token_type_ids out"):
        model(**text, token_type_ids=torch.ones(2, 70, dtype=torch.int64))
    places = torch.arange(70).expand(3, 2, -1)
    with pytest.raises(ValueError, match="position_ids of 3 dimensions"):
        model(**text, position_ids=places)
