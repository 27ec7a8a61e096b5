"""Calibration: what a layer is worth is found, the budget holds, and the model stays as it was."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from models import batch, make_model, with_lora
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.allocate import (
    GIB,
    allocate_memory,
    allocate_retention,
    retention_for_memory,
    share_blocks,
)
from lemo_hf.calibrate import calibrate_thresholds
from lemo_hf.loss import supervised
from lemo_hf.measure import LossRise, sparse_evaluation, training_bytes
from lemo_hf.text_rows import token_rows

DEMO = Path(__file__).parent.parent / "examples" / "demo"
CONFIG = LeMoConfig(retention=0.5, block_size=8, policy="pooled")


def outside_of_weights(model):
    return [
        (type(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m)))
        for m in model.modules()
    ]


def rows(count=2, tokens=80):
    return [{"input_ids": ids.tolist()} for ids in batch(count, tokens)["input_ids"]]


@pytest.fixture
def demo():
    """A small pretrained model, and two rows of a book."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    text = (DEMO / "text" / "train-alice-adams.txt").read_text(encoding="utf-8")[:20_000]
    return model, token_rows([text], tokenizer, 512, max_rows=2, progress=False)


@pytest.fixture
def unchanged():
    """A function that gives a model to watch; at the end nothing of it may have changed."""
    watched = []

    def watch(model):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for module, flag in zip(model.modules(), [True, False, True] * 999, strict=False):
            module.training = flag
        before = outside_of_weights(model)
        watched.append((model, state, before, torch.get_rng_state()))
        return model

    yield watch
    for model, state, before, rng in watched:
        assert outside_of_weights(model) == before
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "mixtral", "opt"])
def test_dense_loss_is_the_stock_models(family):
    model = make_model(family).eval()
    inputs = batch(2, 80)
    with torch.no_grad():
        expected = model(**inputs).loss.item()
    assert LossRise(model, rows()).dense_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("supervise", ["kept", "all"])
def test_loss_rise_is_the_training_loss_less_the_dense_models(supervise, unchanged):
    model = unchanged(with_lora(make_model("llama", attention_dropout=0.5), lora_dropout=0.5))
    config = dataclasses.replace(CONFIG, supervise=supervise, agree_across_layers=False)
    (row,) = rows(1)
    measured = LossRise(model, [row])(config)
    ids = torch.tensor([row["input_ids"]])
    with sparse_evaluation(model):
        model.get_base_model().training = False
        logits = model(input_ids=ids).logits
        model.get_base_model().training = True
        lemo = apply_lemo(model, config)
        handle = lemo.passes.last.register_forward_hook(
            lambda *_: asked.append(supervised(lemo.passes.current))
        )
        asked = []
        loss = model(input_ids=ids, labels=ids).loss
        handle.remove()
        kept = lemo.report()["attention_retention"]
        remove_lemo(model)
    dense = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    mask = asked[0][0, :-1] if supervise == "kept" else torch.ones(79, dtype=torch.bool)
    assert measured.loss_rise == pytest.approx(loss.item() - dense[mask].mean().item(), abs=2e-5)
    assert measured.retentions == pytest.approx([0.5] * 4) and kept == pytest.approx(0.5)


def test_everything_kept_rises_by_nothing():
    for config in (dataclasses.replace(CONFIG, retention=1.0), LeMoConfig(threshold=0.0)):
        assert LossRise(make_model("qwen3"), rows())(config).loss_rise == pytest.approx(0, abs=1e-6)


def test_rows_that_do_not_fit():
    model = make_model("llama")
    with pytest.raises(ValueError, match="at least one row"):
        LossRise(model, [])
    with pytest.raises(ValueError, match="has padding"):
        LossRise(model, [{"input_ids": [5, 6], "attention_mask": [0, 1]}])
    with pytest.raises(ValueError, match="no label but -100"):
        LossRise(model, [{"input_ids": [5, 6], "labels": [-100, -100]}])
    with pytest.raises(ValueError, match="already has LeMo on it"):
        apply_lemo(model, CONFIG)
        LossRise(model, rows())(CONFIG)


def test_share_blocks_is_the_best_of_all_ways():
    points = {
        0: {2: 5.0, 4: 1.0, 8: 0.0},
        1: {2: 1.0, 4: 2.0, 8: 0.0},  # not convex: its hull goes straight from 2 to 8
        2: {2: 3.0, 4: 2.0, 8: 0.5},
    }

    def value(layer, kept):
        corners = {0: (2, 4, 8), 1: (2, 8), 2: (2, 4, 8)}[layer]
        for low, high in pairwise(corners):
            if low <= kept <= high:
                share = (kept - low) / (high - low)
                return (1 - share) * points[layer][low] + share * points[layer][high]

    for total in range(6, 25):
        kept = share_blocks(points, total)
        assert sum(kept.values()) == total
        best = min(
            value(0, a) + value(1, b) + value(2, total - a - b)
            for a in range(2, 9)
            for b in range(2, 9)
            if 2 <= total - a - b <= 8
        )
        assert sum(value(layer, n) for layer, n in kept.items()) == pytest.approx(best)
    with pytest.raises(ValueError, match="budget is 5 blocks in 3 layers, .* measured at is 6"):
        share_blocks(points, 5)


@pytest.mark.parametrize("adapt", [False, True])
def test_a_layer_that_does_nothing_gets_least(adapt, demo, unchanged):
    model, samples = demo
    with torch.no_grad():
        model.model.layers[6].self_attn.o_proj.weight.zero_()
        model.model.layers[6].mlp.down_proj.weight.zero_()
    if adapt:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5))
    config = LeMoConfig(supervise="all", policy="random")
    found = allocate_retention(
        unchanged(model), samples, config, 0.5, grid=(0.25, 1), progress=False
    )
    assert found.retentions[6] == 0.25 == min(found.retentions)
    curve = list(found.curves[6].values())
    assert max(curve) - min(curve) < 1e-5
    assert sum(found.retentions) / 10 == pytest.approx(0.5)
    # With all tokens asked, where they are left out matters, and what was measured adds up.
    assert found.loss_rises["allocated"] < 0.8 * found.loss_rises["uniform, a set each"]
    assert found.config.retention == found.retentions and not found.config.agree_across_layers


def test_the_budget_holds_and_the_best_is_kept(unchanged):
    model = unchanged(make_model("llama"))
    config = dataclasses.replace(CONFIG, dense_first_layers=1)
    asked = dataclasses.replace(config, cuda_graphs=True)
    found = allocate_retention(model, rows(), asked, 0.45, progress=False)
    assert not found.config.cuda_graphs
    assert found.retentions[0] == 1
    assert 0.45 - 0.1 / 3 <= sum(found.retentions[1:]) / 3 <= 0.45
    assert set(found.curves) == {1, 2, 3} and list(found.curves[1]) == [0.2, 0.3, 0.5, 0.8, 1.0]
    measure = LossRise(model, rows())
    rises = [measure(dataclasses.replace(config, retention=0.45)).loss_rise]
    own = dataclasses.replace(config, agree_across_layers=False)
    rises += [
        measure(dataclasses.replace(own, retention=share)).loss_rise
        for share in (0.45, found.retentions)
    ]
    assert list(found.loss_rises.values()) == pytest.approx(rises)
    assert measure(found.config).loss_rise == pytest.approx(min(rises))
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got 1.5"):
        allocate_retention(model, rows(), config, 1.5)
    with pytest.raises(ValueError, match="the budget is 3 blocks in 3 layers"):
        allocate_retention(model, rows(), config, 0.1, progress=False)


def test_thresholds_hold_the_retention_and_lower_the_loss(demo, unchanged):
    model, samples = demo
    config = LeMoConfig(
        block_size=16, policy="pooled", supervise="all", dense_last_layers=7, cuda_graphs=True
    )
    found = calibrate_thresholds(unchanged(model), samples, config, 0.6, progress=False)
    first, last = found.history[0], found.history[-1]
    assert len(set(first["thresholds"][:3])) == 1 and not any(first["thresholds"][3:])
    assert found.config.threshold == last["thresholds"] and found.config.retention is None
    assert not found.config.agree_across_layers and not found.config.cuda_graphs
    assert found.config.supervise == "all"
    for step in found.history:
        assert step["retention"] == pytest.approx(0.6, abs=0.5 / 32)
    rises = [step["loss_rise"] for step in found.history]
    assert len(rises) > 1 and rises == sorted(rises, reverse=True)
    measured = LossRise(model, samples)(found.config)
    assert measured.loss_rise == pytest.approx(last["loss_rise"], rel=1e-5)


def test_a_retention_below_what_must_be_kept(unchanged):
    model = unchanged(make_model("llama"))
    with pytest.raises(ValueError, match="retention=0.05 cannot be reached: .* 0.2 of the rows"):
        calibrate_thresholds(model, rows(), CONFIG, 0.05, progress=False)
    for policy in ("recent", "window"):
        with pytest.raises(ValueError, match=f"policy='{policy}' scores a block by its place"):
            calibrate_thresholds(model, rows(), LeMoConfig(policy=policy), 0.5, progress=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_buys_retention(checkpointing, unchanged):
    model = unchanged(with_lora(make_model("llama", "sdpa"), lora_dropout=0.1))
    config = dataclasses.replace(CONFIG, recompute="full" if checkpointing else "none")
    (row,) = rows(1, 256)

    def bytes_at(share):
        return training_bytes(model, row, dataclasses.replace(config, retention=share))

    assert bytes_at(0.25) < bytes_at(0.5) < bytes_at(1.0)
    budget = (bytes_at(0.5) + bytes_at(0.75)) / 2 / GIB
    share = retention_for_memory(model, row, config, budget)
    assert 0.5 <= share < 0.75 and bytes_at(share) <= budget * GIB < bytes_at(share + 1 / 32)
    assert retention_for_memory(model, row, config, 1000) == 1.0
    with pytest.raises(ValueError, match="1e-09 GiB is less than a training pass takes at reten"):
        retention_for_memory(model, row, config, 1e-9)


def test_a_memory_budget_is_allocated(unchanged):
    model = unchanged(make_model("llama", "sdpa"))
    samples = rows(1, 64)
    gib = training_bytes(model, samples[0], dataclasses.replace(CONFIG, retention=0.5)) / GIB
    found = allocate_memory(model, samples, CONFIG, gib, progress=False)
    assert training_bytes(model, samples[0], found.config) <= gib * GIB
    assert sum(found.retentions) / 4 == pytest.approx(0.5)


def test_gradients_that_were_there_stay():
    model = make_model("llama")
    parameter = model.lm_head.weight
    parameter.grad = gradient = torch.ones_like(parameter)
    training_bytes(model, rows(1)[0], CONFIG)
    assert parameter.grad is gradient and (gradient == 1).all()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        training_bytes(model, rows(1)[0], CONFIG)


def test_a_real_model_on_real_text(demo, unchanged):
    model, samples = demo
    config = LeMoConfig(block_size=16, policy="pooled")
    found = calibrate_thresholds(unchanged(model), samples, config, 0.5, steps=0, progress=False)
    assert 2 < found.dense_loss < 5
    assert found.history[0]["retention"] == pytest.approx(0.5, abs=0.5 / 32)
    assert 0.3 < found.config.threshold[0] < 3  # near the layers' mean score
