"""transformers' flash-attention path over plain PyTorch in place of the CUDA package.

flash_attn needs a GPU; what lemo_hf must get right is what it hands to it: padding masks, document
boundaries, and no position ids with gaps. Everything but the two kernels is transformers' own code.
"""

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from support.batches import left_padded, packed, plain, right_padded
from support.models import loss_and_gradients, make_model, relative_error

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo

pytestmark = pytest.mark.oldest

CALLS = []


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """``[B, T, heads, D]`` causal attention."""
    CALLS.append("flash")
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale
    )
    return out.transpose(1, 2)


def flash_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """The same for documents laid end to end, ``[total, heads, D]``."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q[0] == 0
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    parts = [
        flash(*(x[a:b][None] for x in (q, k, v)), 0.0, softmax_scale, causal)[0]
        for a, b in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)
    ]
    CALLS.append("varlen")
    return torch.cat(parts)


def flashing(family):
    """A model that takes the flash path without transformers' check for the package."""
    model = make_model(family)
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.fixture
def flash_model(monkeypatch):
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    functions = (flash, flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: functions)
    CALLS.clear()
    yield flashing("qwen3")
    flash_utils._loaded_implementation = None


def one_packed_row():
    return {name: value[2:] for name, value in packed().items()}


def one_plain_row():
    return {name: value[:1] for name, value in plain().items()}


def collated_row():
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) adds."""
    inputs = one_packed_row()
    del inputs["position_ids"]
    bounds = torch.tensor([0, 5, 38, 58, 70], dtype=torch.int32)
    lengths = {"max_length_q": 33, "max_length_k": 33}
    return {**inputs, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **lengths}


@pytest.mark.parametrize("agree", [False, True])
@pytest.mark.parametrize("case", [plain, left_padded, right_padded, one_packed_row])
def test_flash_attention_equals_eager(flash_model, case, agree):
    config = LeMoConfig(retention=0.5, block_size=8, policy="random", agree_across_layers=agree)
    apply_lemo(flash_model, config)
    loss, gradients = loss_and_gradients(flash_model, **case())
    assert CALLS.count("varlen" if case is not plain else "flash") >= 4
    remove_lemo(flash_model)
    eager = make_model("qwen3", "eager")
    apply_lemo(eager, config)
    expected, expected_gradients = loss_and_gradients(eager, **case())
    assert loss == pytest.approx(expected, rel=2e-6)
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) < 2e-5, name


@pytest.mark.parametrize("family", ["ministral3", "glm4", "cohere", "gpt_neox"])
def test_flash_attention_of_other_families(flash_model, family):
    """Ministral 3 reads positions, whose gaps flash attention would take for documents."""
    config = LeMoConfig(retention=0.5, block_size=8, policy="random", agree_across_layers=False)
    for inputs in (one_plain_row(), left_padded(), one_packed_row()):
        found = []
        for model in (flashing(family), make_model(family)):
            apply_lemo(model, config)
            found.append(loss_and_gradients(model, **inputs)[0])
        assert found[0] == pytest.approx(found[1], rel=2e-6)


def test_document_bounds_of_the_collator_are_gathered(flash_model):
    """The caller's cu_seq_lens count all tokens; attention gets those of kept tokens."""
    config = LeMoConfig(retention=0.5, block_size=8, policy="recent")
    apply_lemo(flash_model, config)
    by_bounds = loss_and_gradients(flash_model, **collated_row())[0]
    remove_lemo(flash_model)
    eager = make_model("qwen3")
    apply_lemo(eager, config)
    assert by_bounds == pytest.approx(loss_and_gradients(eager, **one_packed_row())[0], rel=2e-6)


def test_a_sliding_window_is_refused(flash_model):
    model = flashing("mistral")
    apply_lemo(model, LeMoConfig(block_size=8))
    with pytest.raises(ValueError, match="sliding window of 24 in kept rows.*sequence has 70"):
        model(**plain())
