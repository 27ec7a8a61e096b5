"""What a trial and a bound are told of attention, for every family."""

import pytest
import torch
from support.models import make_model

from lemo_hf.core import attention
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.hybrids import HYBRIDS
from lemo_hf.core.levels import Levels


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in HYBRIDS])
def test_the_width_of_attention_is_that_of_the_widest_layer(family):
    model = make_model(family)
    row = FAMILIES[family]
    layers = list(model.get_submodule(row.layers))
    levels = Levels(model.parameters, row, layers, None)
    widths = {levels._width(layer) for layer in layers}
    if family == "gemma4_text":
        assert widths == {4 * 8, 4 * 16}  # sliding layers, and those that look everywhere
    else:
        assert len(widths) == 1
    hidden = torch.empty(1, 64, 32, device="meta")
    assert levels.fitting(hidden, [], 2**40) == "selective"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4-shared", "gemma4_text"])
def test_kernels_are_tried_with_the_heads_of_the_layer(family, monkeypatch):
    monkeypatch.setattr(attention, "_tried", lambda *what: what[:3])
    model = make_model(family, "sdpa")
    found = []
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            device = torch.device("cuda")
            found.append(attention.fastest_attention(module, device, torch.bfloat16))
    expected = {
        "llama": {(4, 2, 8)},
        "gemma3_text": {(4, 2, 8)},
        "gemma4_text": {(4, 2, 8), (4, 2, 16)},
        "gemma4-shared": {(4, 2, 16)},
    }
    assert set(found) == expected[family]
