"""Gemma 4: inputs of a layer's own, a factor of the stream, keys and values of earlier layers."""

import pytest
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.families import family_of

pytestmark = pytest.mark.oldest
KINDS = ["sliding_attention", "full_attention"]
SHARED = {"num_hidden_layers": 6, "layer_types": KINDS * 3, "num_kv_shared_layers": 2}


@pytest.mark.parametrize("recompute", ["none", "mlp", "selective", "lean", "full"])
@pytest.mark.parametrize("retention", [1.0, 0.5])
def test_shared_keys_at_every_level_of_recompute(recompute, retention):
    """Two layers read keys of layers 2 and 3; layers 0 and 1 keep everything."""
    model = make_model("gemma4_text", "sdpa", **SHARED)
    config = LeMoConfig(
        retention=retention, block_size=8, policy="recent", dense_first_layers=2, recompute="none"
    )
    inputs = batch()
    stock = loss_and_gradients(model, **inputs)
    apply_lemo(model, config)
    expected = loss_and_gradients(model, **inputs)
    remove_lemo(model)
    apply_lemo(model, LeMoConfig(**{**vars(config), "recompute": recompute}))
    loss, gradients = loss_and_gradients(model, **inputs)
    if retention == 1:
        expected = stock
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert (loss == pytest.approx(stock[0], rel=1e-6)) == (retention == 1)
    assert gradients.keys() == expected[1].keys()
    most = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        if gradient.norm() > 1e-6 * most:
            assert relative_error(gradients[name], gradient) < 1e-4, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agree_across_layers": False}, "agree_across_layers=False: layers of 'gemma4_text'"),
        ({"dense_last_layers": 1}, "dense_last_layers=1: .* Set dense_last_layers=0"),
        ({"mlp_retention": 0.5}, "mlp_retention=0.5: .* Set mlp_retention=None"),
        ({"retention": [0.5] * 6}, "retention and threshold by layer"),
        ({"policy": "pooled"}, "policy='pooled'"),
        ({"dense_first_layers": 3}, "layer 2 gives its keys and values to layers from 4 on"),
    ],
)
def test_all_layers_keep_the_same_tokens(settings, message):
    model = make_model("gemma4_text", **SHARED)
    with pytest.raises(ValueError, match=message):
        apply_lemo(model, LeMoConfig(**{"block_size": 8, **settings}))


def test_experts_beside_the_mlp_are_refused():
    model = with_lora(make_model("gemma4_text"))
    model.config.enable_moe_block = True
    with pytest.raises(ValueError, match="enable_moe_block=True is not supported"):
        family_of(model.config)
