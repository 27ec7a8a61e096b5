"""MLPs of experts that choose for themselves by scores."""

import pytest
import torch
from support.batches import compare, left_padded
from support.models import make_model, with_lora
from support.scores import score

from lemo_hf import LeMoConfig
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.sublayer import mlp_calls

EXPERTS = {"qwen3_moe": "mlp", "granitemoe": "block_sparse_moe", "gpt_oss": "mlp.experts"}


@pytest.mark.parametrize("policy", ["oracle", "pooled"])
@pytest.mark.parametrize("family", EXPERTS)
def test_they_choose_by_any_policy(family, policy, monkeypatch):
    """And the pass is that of a masked dense model."""
    config = LeMoConfig(
        retention=0.5,
        mlp_retention=0.3,
        block_size=8,
        policy=policy,
        agree_across_layers=False,
        recompute="mlp",
    )
    compare(with_lora(make_model(family)), left_padded(), config, monkeypatch, EXPERTS[family])


@pytest.mark.parametrize("family", EXPERTS)
def test_the_score_is_the_size_of_their_update(family):
    got, inputs = score(make_model(family), "oracle", "mlp")
    with torch.no_grad():
        update = inputs.layer.post_attention_layernorm(inputs.x)
        for call in mlp_calls(inputs.layer, FAMILIES[family]):
            update = call(update)
    truth = torch.stack([part.amax(1) for part in update.abs().mean(-1).split(8, 1)], 1)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-6)
