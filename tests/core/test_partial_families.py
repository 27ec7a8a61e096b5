"""Every row of the family table: any kept set equals the dense layers with tokens masked."""

from dataclasses import replace

import pytest
import torch
from support.batches import compare, completion_only, left_padded, packed
from support.models import (
    EAGER,
    VARIANTS,
    loss_and_gradients,
    make_model,
    relative_error,
    with_lora,
)

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.families import FAMILIES, family_of

# Which build their causal mask without position ids: the stock model knows no documents.
NO_DOCUMENTS = ("opt", "falcon", "falcon-rw", "falcon-11b", "falcon-40b", "bloom")
# Whose output is the update, where it is not "mlp".
UPDATE = {
    "opt": "fc2",
    "granitemoe": "block_sparse_moe",
    "gpt_oss": "mlp.experts",
    "granitemoehybrid": "block_sparse_moe shared_mlp",
    **dict.fromkeys(("lfm2", "lfm2_moe", "bamba", "jamba"), "feed_forward"),
}
CONFIG = LeMoConfig(
    retention=0.5, block_size=8, policy="random", agree_across_layers=False, segment_size=50
)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_equals_masked_dense_layers(family, monkeypatch):
    """Padding, packing and rows that keep different numbers of blocks, each layer its own set."""
    model = with_lora(make_model(family, num_hidden_layers=2))
    one_set = family_of(model.get_base_model().config).layer_scale is not None
    config = replace(CONFIG, agree_across_layers=one_set)
    for case in (left_padded, packed, completion_only):
        if case is not packed or family not in NO_DOCUMENTS:
            compare(model, case(), config, monkeypatch, UPDATE.get(family, "mlp"))


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, *VARIANTS) if name not in EAGER])
def test_sdpa_is_eager(family):
    """Also with checkpointing, where it follows the model's, and with one set for all layers."""
    model = make_model(family, num_hidden_layers=2)
    inputs = left_padded()
    found = []
    for attention in ("eager", "sdpa", "sdpa"):
        model.set_attn_implementation(attention)
        if len(found) == 2:
            model.gradient_checkpointing_enable()
        apply_lemo(model, LeMoConfig(retention=0.5, block_size=8))
        found.append(loss_and_gradients(model, **inputs))
        remove_lemo(model)
    for loss, gradients in found[family == "falcon-rw" :]:  # see test_families.py
        assert loss == pytest.approx(found[1][0], rel=2e-6)
        for name, gradient in gradients.items():
            if gradient.norm() > 1e-6:
                assert relative_error(found[1][1][name], gradient) < 1e-4, name
    assert torch.isfinite(torch.tensor(found[0][0]))
