"""For any kept set, the sparse layers equal dense layers with eliminated tokens masked."""

import pytest
import torch
from support.batches import CASES, compare, left_padded
from support.dense_reference import expected_loss, masked_dense, recorded_sets
from support.grids import covering
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.batch.selection import kept_set
from lemo_hf.config import LEVELS
from lemo_hf.core import kept_inputs
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.sparse_pass import SparsePass


@pytest.mark.parametrize("case", CASES)
def test_equals_masked_dense_layers(case, monkeypatch):
    """Of Llama; test_partial_families.py has the others."""
    model = with_lora(make_model("llama"))
    config = LeMoConfig(
        retention=0.5, block_size=8, policy="random", agree_across_layers=False, segment_size=50
    )
    compare(model, case(), config, monkeypatch)


@pytest.mark.parametrize(
    ("policy", "mlp_retention", "agree", "recompute"),
    covering(["oracle", "pooled", "random", "auto", "chunks"], [None, 0.3], [False, True], LEVELS),
)
def test_every_policy_and_way_of_sharing(policy, mlp_retention, agree, recompute, monkeypatch):
    config = LeMoConfig(
        retention=0.4,
        mlp_retention=mlp_retention,
        block_size=8,
        policy=policy,
        agree_across_layers=agree,
        supervise="all" if agree else "kept",
        recompute=recompute,
    )
    compare(with_lora(make_model("llama")), left_padded(), config, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_sdpa_and_full_fine_tuning(case, monkeypatch):
    model = make_model("qwen3", "sdpa")
    config = LeMoConfig(retention=0.5, block_size=8, policy="random", agree_across_layers=False)
    lemo_loss, gradients = _run(model, case(), config)
    model.set_attn_implementation("eager")
    eager_loss, eager_gradients = _run(model, case(), config)
    assert lemo_loss == pytest.approx(eager_loss, rel=1e-6)
    assert all(relative_error(gradients[n], eager_gradients[n]) < 1e-5 for n in gradients)
    compare(model, case(), config, monkeypatch)


def _run(model, inputs, config):
    apply_lemo(model, config)
    try:
        return loss_and_gradients(model, **inputs)
    finally:
        remove_lemo(model)


def test_dense_layers_between_sparse_ones(monkeypatch):
    """A retention of 1 in the middle, dense layers at both ends."""
    config = LeMoConfig(
        retention=(1.0, 0.5, 1.0, 0.4, 1.0, 1.0),
        block_size=8,
        agree_across_layers=False,
        dense_first_layers=1,
        dense_last_layers=1,
    )
    model = make_model("llama", num_hidden_layers=6)
    apply_lemo(model, config)
    with recorded_sets(monkeypatch) as chosen:
        loss, gradients = loss_and_gradients(model, **left_padded())
    remove_lemo(model)
    sets = [(mask, mask) for _, mask in chosen]
    assert len(sets) == 4
    inputs = left_padded()
    real = inputs["attention_mask"].bool()
    times = sum(mask.int() for _, mask in chosen)
    supervised = (times >= times.sum(1, keepdim=True) / real.sum(1, keepdim=True)) & real
    labels = inputs.pop("labels")
    with masked_dense(list(model.model.layers)[1:5], sets, "mlp"):
        expected = expected_loss(model(**inputs, use_cache=False).logits, labels, supervised, real)
        expected.backward()
    assert loss == pytest.approx(expected.item(), rel=2e-6)
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < 2e-5, name


def test_post_norm_opt_leaves_eliminated_tokens_alone():
    """OPT-350m norms behind the residual; an eliminated token must not be normed either."""
    model = make_model("opt", do_layer_norm_before=False)
    inputs = batch()
    stock = loss_and_gradients(model, **inputs)
    full = _run(model, inputs, LeMoConfig(retention=1.0, block_size=16))
    assert full[0] == pytest.approx(stock[0], rel=1e-6)
    for name, expected in stock[1].items():
        if "k_proj.bias" not in name:  # its gradient is zero but for rounding
            assert relative_error(full[1][name], expected) < 2e-6, name

    layer = model.model.decoder.layers[1]
    seen = {}
    lemo = apply_lemo(
        model,
        LeMoConfig(retention=0.4, block_size=8, dense_first_layers=1, dense_last_layers=2),
    )
    layer.register_forward_pre_hook(lambda _, args: seen.update(before=args[0].clone()))

    def after(_, args, output):
        seen.update(after=output.clone(), kept=lemo.passes.current.agreed["attention"].index)

    layer.register_forward_hook(after)
    model(**inputs)
    changed = (seen["before"] != seen["after"]).any(-1)
    kept = torch.zeros_like(changed).scatter_(1, seen["kept"], True)
    assert torch.equal(changed, kept)


def test_the_callers_embeddings_stay_whole():
    model = make_model("llama")
    apply_lemo(model, LeMoConfig(block_size=8))
    embeddings = torch.randn(2, 40, 32, requires_grad=True)
    before = embeddings.detach().clone()
    model(inputs_embeds=embeddings, labels=torch.randint(3, 97, (2, 40))).loss.backward()
    assert torch.equal(embeddings, before)
    assert embeddings.grad.isfinite().all() and (embeddings.grad != 0).any()


def test_the_gradient_may_come_expanded():
    """`sum()` hands an expanded gradient down, which must not be written to."""
    model = make_model("llama")
    apply_lemo(model, LeMoConfig(block_size=8)).begin_step(0)  # which has a loss of its own
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    hidden = []
    head = model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(input_ids=batch()["input_ids"])
    head.remove()
    hidden[0].sum().backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(input_ids=batch()["input_ids"])
    (hidden[1] * torch.ones_like(hidden[1])).sum().backward()
    model.model.norm = norm
    assert torch.equal(model.model.embed_tokens.weight.grad, gradient)


@pytest.mark.parametrize("retention", [0.5, 1.0])
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_batch_without_labels_teaches_nothing(retention, items, tokens):
    """Answers that truncation cut off, or rows of one token: no NaN reaches a weight."""
    model = make_model("llama")
    apply_lemo(model, LeMoConfig(retention=retention, block_size=8))
    inputs = batch(2, tokens)
    if tokens > 1:
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs, num_items_in_batch=items).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_no_mask_answers_for_another(monkeypatch):
    """What was gathered from a mask is found by the mask, which lives as long."""
    seen = []
    real = kept_inputs.kept_mask
    monkeypatch.setattr(kept_inputs, "kept_mask", lambda *a: (seen.append(a[0]), real(*a))[1])
    sparse_pass = SparsePass(LeMoConfig(block_size=8), (1, 32), torch.device("cpu"))
    kept = kept_set(torch.arange(32)[None] < 16, torch.arange(4)[None] < 2, 16, True, shared=True)
    for number in range(20):  # freed masks would get each other's memory
        mask = torch.full((1, 1, 32, 32), float(number))
        found = kept_inputs.kept_attention_inputs(
            kept, sparse_pass, FAMILIES["llama"], mask, None, None, False
        )
        assert found["attention_mask"].eq(number).all()
        del mask
    assert len(seen) == 20
