"""Batches of all kinds, and a comparison with the masked dense model."""

import pytest
import torch

from lemo_hf import apply_lemo, remove_lemo
from lemo_hf.core.families import family_of
from lemo_hf.patch import transformers_model
from support.dense_reference import expected_loss, masked_dense, recorded_sets
from support.models import batch, loss_and_gradients, relative_error


def plain():
    return batch(rows=3)


def padded(left):
    inputs = plain()
    mask = torch.ones_like(inputs["input_ids"])
    for row, padding in enumerate((0, 9, 25)):
        mask[row, slice(0, padding) if left else slice(70 - padding, 70)] = 0
    inputs["labels"][mask == 0] = -100
    return {**inputs, "attention_mask": mask}


def left_padded():
    return padded(left=True)


def right_padded():
    return padded(left=False)


def packed():
    inputs = plain()
    lengths = ((70,), (30, 40), (5, 33, 20, 12))
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    return {**inputs, "position_ids": torch.stack(positions)}


def completion_only():
    """Rows keep different numbers of blocks: their answers have different lengths."""
    inputs = plain()
    for row, answer in enumerate((4, 20, 50)):
        inputs["labels"][row, : 70 - answer] = -100
    return inputs


CASES = [plain, left_padded, right_padded, packed, completion_only]


def compare(model, inputs, config, monkeypatch, mlp_output="mlp"):
    """Assert that loss and every gradient equal the masked dense model's."""
    lemo = apply_lemo(model, config)
    with recorded_sets(monkeypatch) as chosen:
        loss, gradients = loss_and_gradients(model, **inputs)
    report = lemo.report()
    remove_lemo(model)

    family = family_of(transformers_model(model).config)
    layers = transformers_model(model).get_submodule(family.layers)
    attention = [mask for name, mask in chosen if name == "attention"]
    mlp = [mask for name, mask in chosen if name == "mlp"] or attention
    sets = list(zip(attention, mlp, strict=True))
    assert len(sets) == len(layers)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    for keep_mask in (*attention, *mlp):
        assert not (keep_mask & ~real).any()
    kept = torch.stack(attention + mlp).sum() / (2 * len(layers))
    assert report["kept_tokens"] == pytest.approx(float(kept))
    assert kept < real.sum()

    if config.agree_across_layers:
        assert all(torch.equal(a, attention[0]) for a in attention)
        times = attention[0].int() + (mlp[0].int() if mlp is not attention else 0)
    else:
        times = torch.stack([m.int() for _, m in chosen]).sum(0)
    mean = times.sum(1, keepdim=True) / real.sum(1, keepdim=True)
    supervised = (times >= mean) & real
    if config.supervise == "all":
        supervised = torch.ones_like(real)
    labels = inputs["labels"]
    rest = {k: v for k, v in inputs.items() if k != "labels"}
    model.zero_grad()
    recurrent = family.recurrent and family.recurrent.attention
    with masked_dense(layers, sets, mlp_output, family.attention, recurrent):
        expected = expected_loss(model(**rest, use_cache=False).logits, labels, supervised, real)
        expected.backward()
    assert loss == pytest.approx(expected.item(), rel=2e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            assert relative_error(gradients[name], parameter.grad) < 2e-5, name
    model.zero_grad()
