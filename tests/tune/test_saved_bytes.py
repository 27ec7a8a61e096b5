"""Bytes that a forward pass stores, counted by hand and for LeMo's loss."""

import pytest
import torch
from support.models import batch, make_model, with_lora
from torch import nn

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.tune.measure import saved_bytes


def test_each_storage_counts_once_and_parameters_do_not():
    model = nn.Linear(8, 16, bias=False)
    rows = torch.randn(4, 8)

    def forward():
        out = model(rows)  # stores its input
        return (out.exp() * out).sum()  # the exponential, and both factors: one of them again

    assert saved_bytes(model, forward) == 4 * (rows.numel() + 2 * 4 * 16)


def test_the_gradient_that_the_loss_holds_is_seen():
    """Without gradients but of the stream, the loss of a frozen head stores one of its size."""
    model = with_lora(make_model("llama"))
    inputs = batch(2, 64)
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=16))
    whole = saved_bytes(model, lambda: model(**inputs).loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lemo_hf.tune.measure.getattr", lambda *_: None, raising=False)
        without = saved_bytes(model, lambda: model(**inputs).loss)
    remove_lemo(model)
    assert whole - without == 2 * 64 * model.config.hidden_size * 4


def test_half_of_the_tokens_store_less():
    model = with_lora(make_model("llama"))
    stored = {}
    for retention in (1.0, 0.5):
        config = LeMoConfig(retention=retention, block_size=8, policy="recent", supervise="kept")
        apply_lemo(model, config)
        stored[retention] = saved_bytes(model, lambda: model(**batch(2, 64)).loss)
        remove_lemo(model)
    assert 0.4 < stored[0.5] / stored[1.0] < 0.7
