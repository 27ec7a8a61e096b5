"""A model that changes gets CUDA graphs anew: its weights, its FP8 copies, its adapters."""

import copy
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from support.graph_cases import assert_same_gradients, batches, graphs_of, tiny, with_twin

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core import fp8


def test_weights_that_moved_are_found(device):
    model, twin = with_twin(device)
    for step, inputs in enumerate(batches(device, steps=9)):
        if step == 4:
            for weight in model.parameters():
                weight.data = weight.data.clone()
        if step in (4, 6):
            for one in (model, twin):
                one.set_adapter("default")
                for name, weight in one.named_parameters():
                    if "q_proj.lora" in name:
                        weight.requires_grad_(step == 6)
        found, expected = model(**inputs).loss, twin(**inputs).loss
        found.backward(), expected.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(model, twin)


def test_steps_in_bf16_have_graphs_of_their_own(device, monkeypatch):
    """A graph with products in FP8 is not replayed when they are no longer, nor the other way."""
    monkeypatch.setattr(fp8, "FEWEST_ROWS", 16)
    config = LeMoConfig(retention=0.5, block_size=8, policy="recent", fp8=True, bf16_finish=0.5)
    twins = [tiny(device).to(torch.bfloat16 if device == "cuda" else torch.float32) for _ in "ab"]
    with_graphs, without = (
        apply_lemo(model, replace(config, cuda_graphs=graphs))
        for model, graphs in zip(twins, (True, False), strict=True)
    )
    graphs, found = [], [[], []]
    for step, inputs in zip((*range(8), 0, 1), 10 * batches(device, steps=1), strict=True):
        for lemo in (with_graphs, without):
            lemo.begin_step(step, 8)
        for model, losses_of in zip(twins, found, strict=True):
            loss = model(**inputs).loss
            loss.backward()
            losses_of.append(loss.item())
            model.zero_grad()
        graphs.append(graphs_of(twins[0]))
    assert graphs == [0, 1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert found[0] == pytest.approx(found[1], rel=1e-5 if device == "cpu" else 1e-2)
    assert found[0][3] != found[0][4]  # the same rows, in FP8 and not


def counted(weight):
    with torch.no_grad():
        weight.mul_(-1)


def past_the_count(weight):
    weight.data.mul_(-1)


@pytest.mark.parametrize("change", [counted, past_the_count])
def test_graphs_have_fp8_copies_of_the_weights_as_they_are(device, change, monkeypatch):
    monkeypatch.setattr(fp8, "FEWEST_ROWS", 16)
    config = LeMoConfig(retention=0.5, block_size=8, policy="recent", fp8=True)
    twins = [tiny(device).to(torch.bfloat16 if device == "cuda" else torch.float32) for _ in "ab"]
    for model, graphs in zip(twins, (True, False), strict=True):
        apply_lemo(model, replace(config, cuda_graphs=graphs))
    found, graphs = [[], []], []
    for step, inputs in enumerate(9 * batches(device, steps=1)):
        for model, losses_of in zip(twins, found, strict=True):
            if step == 4:
                change(model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight)
            loss = model(**inputs).loss
            loss.backward()
            losses_of.append(loss.item())
            model.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()  # what is seen late is seen by the next pass
        graphs.append(graphs_of(twins[0]))
    assert 0 in graphs[4:6] and graphs[-1] == 1
    assert found[0] == pytest.approx(found[1], rel=1e-5 if device == "cpu" else 1e-2)
    assert found[0][3] != pytest.approx(found[0][-1], rel=1e-3)


def scale(model):
    for part in model.modules():
        if isinstance(part, LoraLayer):
            part.set_scale("default", 5.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.disable_adapter_layers(),
        scale,
    ],
    ids=["merged", "off", "scaled"],
)
def test_adapters_that_are_merged_off_or_scaled_have_graphs_of_their_own(device, change):
    model, twin = with_twin(device)
    for one in (model, twin):  # which no adapter takes a gradient from
        one.get_base_model().model.norm.weight.requires_grad_(True)
    for step, inputs in enumerate(batches(device, steps=7)):
        if step == 4:
            for one in (model, twin):
                change(one)
        found, expected = model(**inputs).loss, twin(**inputs).loss
        assert graphs_of(model) == (step not in (0, 4))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        if step >= 4:
            found.backward(), expected.backward()
    assert_same_gradients(model, twin)


def in_place(model):
    for part in model.modules():
        for name, weight in part._parameters.items():
            if weight is not None and weight.requires_grad:
                part._parameters[name] = torch.nn.Parameter(weight.data)


def elsewhere(model):
    state = {name: x * 1.1 for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def with_its_module(model):
    layer = model.get_base_model().model.layers[1]
    layer.mlp = copy.deepcopy(layer.mlp)


@pytest.mark.parametrize("replace_weights", [in_place, elsewhere, with_its_module])
def test_weights_that_were_replaced_are_found(device, replace_weights):
    model, twin = with_twin(device)
    for step, inputs in enumerate(batches(device, steps=7)):
        if step == 4:
            for one in (model, twin):
                replace_weights(one)
        found, expected = model(**inputs).loss, twin(**inputs).loss
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        if step >= 4:
            found.backward(), expected.backward()
    assert graphs_of(model) == 1
    assert_same_gradients(model, twin)
