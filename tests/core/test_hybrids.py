"""Families in which some layers pass a state from token to token."""

from dataclasses import replace

import pytest
import torch
from support.dense_reference import recorded_sets
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core import sparse_pass
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.hybrids import HYBRIDS

pytestmark = pytest.mark.oldest
TAIL = LeMoConfig(retention=0.5, block_size=10, policy="recent")


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_contiguous_set_is_the_stock_model_on_that_piece(family, recompute, monkeypatch):
    """Every layer keeps the row's second half, and so the state starts there from nothing.

    Of its own accord LeMo keeps the first block too.
    """
    second_half = torch.arange(8).expand(2, 8) >= 4
    monkeypatch.setattr(sparse_pass, "keep_blocks", lambda *_: second_half)
    model = with_lora(make_model(family, "sdpa"))
    inputs = batch(2, 80)
    inputs["labels"][:, :60] = -100
    apply_lemo(model, replace(TAIL, recompute=recompute))
    with recorded_sets(monkeypatch) as chosen:
        loss, gradients = loss_and_gradients(model, **inputs)
    remove_lemo(model)
    places = torch.arange(80)
    assert all(torch.equal(keep, (places >= 40).expand(2, 80)) for _, keep in chosen)
    piece = {name: value[:, 40:] for name, value in inputs.items()}
    expected = loss_and_gradients(model, **piece, position_ids=places[None, 40:])
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        if gradient.norm() > 1e-6:
            assert relative_error(gradients[name], gradient) < 1e-4, name


def test_the_state_passes_over_what_is_left_out():
    """In layers that see three tokens each, the last ones before a gap move what comes behind it.

    No layer attends, so without the state nothing before the gap could.
    """
    model = make_model("lfm2", num_hidden_layers=2, layer_types=["conv", "conv"])
    lemo = apply_lemo(model, LeMoConfig(retention=0.5, block_size=10, policy="recent"))
    assert "no attention" in lemo.describe()
    inputs = batch(1, 40)
    inputs["labels"][:, :31] = -100  # behind the gap from 10 to 30, and 30 predicts the first
    losses = []
    for place, token in ((8, 3), (8, 4), (2, 5)):
        inputs["input_ids"][0, place] = token
        losses.append(loss_and_gradients(model, **inputs)[0])
    assert losses[0] != losses[1]  # two layers see four tokens back, over the gap
    assert losses[1] == losses[2]  # and no more than four


def test_recurrent_layers_are_named_and_run_again_whole():
    """What they would store is not known, so that memory cannot decide."""
    model = make_model("qwen3_5_text")
    lemo = apply_lemo(model, LeMoConfig(block_size=8))
    assert "recurrent layers on kept tokens as one shorter sequence" in lemo.describe()
    model.gradient_checkpointing_enable()
    loss_and_gradients(model, **batch())
    assert list(lemo.passes.levels._found.values()) == ["full"]


def test_layers_have_the_row_of_their_kind():
    for name, row in HYBRIDS.items():
        model = make_model(name)
        rows = [row.of_layer(layer) for layer in model.get_submodule(row.layers)]
        assert [x.carries_state for x in rows] == [True, False, True, False], name
    llama = make_model("llama").model.layers[0]
    assert FAMILIES["llama"].of_layer(llama) is FAMILIES["llama"]


@pytest.mark.parametrize("policy", ["pooled", "oracle"])
def test_layers_without_queries_are_not_compared(policy):
    with pytest.raises(ValueError, match=f"policy='{policy}': some layers of 'lfm2' pass a state"):
        apply_lemo(make_model("lfm2"), LeMoConfig(block_size=8, policy=policy))


def test_bounds_of_documents_are_refused():
    model = make_model("qwen3_next")
    apply_lemo(model, LeMoConfig(block_size=8))
    with pytest.raises(ValueError, match="seq_idx: bounds of packed documents"):
        model(**batch(), seq_idx=torch.zeros(2, 70, dtype=torch.int32))


@pytest.mark.parametrize("family", ["qwen3_5_text", "gemma4_text"])
def test_no_sequence_parallelism(family):
    config = LeMoConfig(block_size=8, sequence_parallel_size=2)
    with pytest.raises(
        ValueError, match="layers of .* read more inputs than their rows and rotary tables"
    ):
        apply_lemo(make_model(family, "sdpa"), config)


def test_small_granites_have_one_mlp():
    model = with_lora(make_model("granitemoehybrid", num_local_experts=0))
    loss, gradients = loss_and_gradients(model, **batch())
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8))
    found = loss_and_gradients(model, **batch())
    assert found[0] == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        if gradient.norm() > 1e-6:
            assert relative_error(found[1][name], gradient) < 1e-4, name
