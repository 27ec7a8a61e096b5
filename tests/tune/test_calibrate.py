"""Calibration: thresholds hold the retention, lower the loss, and the model stays as it was."""

import dataclasses

import pytest
import torch
from support.models import batch, make_model, with_lora
from support.paths import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.loss import supervised
from lemo_hf.storage.text_rows import token_rows
from lemo_hf.tune.calibrate import calibrate_thresholds
from lemo_hf.tune.measure import LossRise, sparse_evaluation

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
    with pytest.raises(ValueError, match=r"retention must lie in \(0, 1\], got 1.5"):
        calibrate_thresholds(model, rows(), CONFIG, 1.5)
    for policy in ("recent", "window"):
        with pytest.raises(ValueError, match=f"policy='{policy}' scores blocks by their place"):
            calibrate_thresholds(model, rows(), LeMoConfig(policy=policy), 0.5, progress=False)


def test_a_real_model_on_real_text(demo, unchanged):
    model, samples = demo
    config = LeMoConfig(block_size=16, policy="pooled")
    found = calibrate_thresholds(unchanged(model), samples, config, 0.5, steps=0, progress=False)
    assert 2 < found.dense_loss < 5
    assert found.history[0]["retention"] == pytest.approx(0.5, abs=0.5 / 32)
    assert 0.3 < found.config.threshold[0] < 3  # near the layers' mean score
