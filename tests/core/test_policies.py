"""What each policy ranks highest, that it is repeatable, and the seam for predictors."""

import dataclasses

import pytest
import torch
from support.dense_reference import recorded_sets
from support.models import batch, make_model, with_lora
from support.parity import materialised_shares
from support.scores import score
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.config import POLICIES as CONFIG_POLICIES
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.policies import POLICIES
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.predictors.rarity import rarity
from lemo_hf.predictors.training_free import (
    Places,
    chunk_scores,
    pool_blocks,
    random_scores,
    row_keys,
    window_scores,
)


def llama_query_key(inputs, rows, positions):
    """Written out for Llama with LoRA: norm, projection, rotation."""
    attention = inputs.layer.self_attn
    shape = (*rows.shape[:2], -1, attention.head_dim)
    query = attention.q_proj(rows).view(shape).transpose(1, 2)
    key = attention.k_proj(rows).view(shape).transpose(1, 2)
    return apply_rotary_pos_emb(query, key, *positions)


@pytest.mark.parametrize("labels_from", [None, 52])
def test_oracle_is_what_asking_blocks_look_at_by_the_real_queries_and_keys(labels_from):
    model = with_lora(make_model("llama")).get_base_model()
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :11] = 0
    got, inputs = score(model, "oracle", attention_mask=mask, labels_from=labels_from)
    assert inputs.sparse_pass.asking_blocks.sum(1).tolist() == (
        [9, 8] if labels_from is None else [3, 3]
    )
    with torch.no_grad():
        rows = inputs.layer.input_layernorm(inputs.x)
        query, key = llama_query_key(inputs, rows, inputs.position_embeddings)
    scaling = inputs.layer.self_attn.scaling
    asking = inputs.sparse_pass.asking_blocks
    truth = materialised_shares(query, key, asking, 8, scaling, mask.bool()).sum(1)
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


def test_pooled_is_the_score_of_mean_queries_and_keys():
    model = make_model("llama")
    got, inputs = score(model, "pooled", labels_from=52)
    with torch.no_grad():
        rows = inputs.layer.input_layernorm(inputs.x)
        means = torch.stack([part.mean(1) for part in rows.split(8, 1)], 1)
        middles = [min(start + 4, 69) for start in range(0, 70, 8)]
        positions = [part[:, middles] for part in inputs.position_embeddings]
        query, key = llama_query_key(inputs, means, positions)
    scaling = inputs.layer.self_attn.scaling
    truth = materialised_shares(query, key, inputs.sparse_pass.asking_blocks, 1, scaling).sum(1)
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [x for x, row in FAMILIES.items() if not row.own_attention])
@pytest.mark.parametrize("policy", ["oracle", "pooled"])
def test_every_family_can_be_scored_without_a_trace(family, policy):
    model = make_model(family)
    implementation = model.config._attn_implementation
    got, inputs = score(model, policy)
    assert got.shape == (2, 9) and got.isfinite().all() and (got >= 0).all() and got.std() > 0
    assert getattr(inputs.layer, inputs.family.attention).config is model.config
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gemma2"])
def test_mlp_scores_are_the_intermediate_activation(family):
    model = make_model(family)
    got, inputs = score(model, "oracle", "mlp")
    seen = []
    down = inputs.layer.get_submodule(inputs.family.intermediate)
    with down.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        hidden = getattr(inputs.layer, inputs.family.mlp_norm)(inputs.x)
        for name in inputs.family.mlp:
            hidden = getattr(inputs.layer, name)(hidden)
    activity = seen[0].abs().mean(-1)
    truth = torch.stack([part.amax(1) for part in activity.split(8, 1)], 1)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-6)
    assert score(model, "pooled", "mlp")[0].shape == (2, 9)


def test_every_policy_of_the_config_exists():
    assert tuple(POLICIES) == CONFIG_POLICIES


def test_pool_blocks_means_valid_tokens_only():
    rows = torch.randn(2, 11, 3)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1, :6] = False
    pooled = pool_blocks(rows, valid, 4)
    torch.testing.assert_close(pooled[0, 2], rows[0, 8:].mean(0))
    torch.testing.assert_close(pooled[1, 1], rows[1, 6:8].mean(0))
    assert (pooled[1, 0] == 0).all()
    torch.testing.assert_close(pool_blocks(rows, None, 4)[1, 0], rows[1, :4].mean(0))


def test_random_scores_depend_on_all_they_should_and_nothing_else():
    ids = batch(3, 40)["input_ids"]
    keys = row_keys(ids, None)
    scores = random_scores(keys, 1000, 0, 5, 2, 0)
    alone = random_scores(row_keys(ids[1:2], None), 1000, 0, 5, 2, 0)
    assert torch.equal(scores[1:2], alone)
    padded = torch.nn.functional.pad(ids, (3, 0))
    valid = torch.nn.functional.pad(torch.ones_like(ids), (3, 0)).bool()
    assert torch.equal(row_keys(padded, valid), keys)
    for other in ((1, 5, 2, 0), (0, 6, 2, 0), (0, 5, 3, 0), (0, 5, 2, 1)):
        assert (random_scores(keys, 1000, *other) != scores).float().mean() > 0.99
    flat = scores.flatten()
    assert flat.min() >= 0 and flat.max() < 1
    assert abs(flat.mean() - 0.5) < 0.02 and abs(flat.std() - 12**-0.5) < 0.02
    assert torch.corrcoef(scores).triu(1).abs().max() < 0.1


def test_a_window_is_neighbours_on_a_ring_and_every_place_is_as_likely():
    keys, real = torch.arange(20_000), torch.ones(20_000, 16, dtype=torch.bool)
    places = Places.of(real, None)
    scores = window_scores(keys, places, 0, 5)
    assert scores.sort(1).values.eq(torch.arange(16)).all()
    best = scores >= 8  # of half of the blocks
    edges = (best != best.roll(1, 1)).sum(1)
    assert edges.eq(2).all()  # one beginning and one end
    assert (best.float().mean(0) - 0.5).abs().max() < 0.02  # 5 standard deviations
    start = scores.argmax(1)
    assert (start.bincount(minlength=16) / 20_000 - 1 / 16).abs().max() < 0.01
    assert (window_scores(keys, places, 0, 6).argmax(1) != start).float().mean() > 0.9
    padded = Places.of(torch.nn.functional.pad(real, (2, 5)), None)
    assert torch.equal(window_scores(keys, padded, 0, 5)[:, 2:-5], scores)


def test_chunks_are_runs_and_every_block_is_as_likely():
    keys, real = torch.arange(20_000), torch.ones(20_000, 32, dtype=torch.bool)
    places = Places.of(real, None)
    scores = chunk_scores(keys, places, 4, 0, 5)
    changes = scores.diff(dim=1) != 0
    gaps = changes.sum(1)
    assert gaps.min() >= 7 and gaps.max() <= 8  # 8 or 9 runs, of 4 but for the first and last
    inner = changes[:, 3:-3].float().mean(0)
    assert (inner - 0.25).abs().max() < 0.02  # any two neighbours are parted as often
    assert ((scores > 0.7).float().mean(0) - 0.3).abs().max() < 0.02
    assert (chunk_scores(keys, places, 4, 0, 6) != scores).float().mean() > 0.99
    padded = Places.of(torch.nn.functional.pad(real, (2, 5)), None)
    assert torch.equal(chunk_scores(keys, padded, 4, 0, 5)[:, 2:-5], scores)


def test_chunks_of_documents_are_drawn_apart():
    documents = torch.tensor([[0] * 10 + [1] * 22]).expand(5000, -1)
    places = Places.of(torch.ones_like(documents, dtype=torch.bool), documents)
    assert places.place[0].tolist() == [*range(10), *range(22)]
    assert places.size[0].tolist() == [10] * 10 + [22] * 22
    scores = chunk_scores(torch.arange(5000), places, 4, 0, 0)
    assert (scores[:, 9] != scores[:, 10]).all()
    pair = torch.stack([scores[:, 0], scores[:, 10]])
    assert torch.corrcoef(pair)[0, 1].abs() < 0.06


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "predictor"])
@pytest.mark.parametrize("tokens", [33, 38, 40])
def test_padding_beside_a_row_moves_no_score(policy, tokens):
    """Else what a row keeps would depend on the rows it is batched with."""
    model = make_model("llama")
    alone, _ = score(model, policy, tokens=tokens)
    mask = (torch.arange(70) < tokens).long().expand(2, -1)
    padded, inputs = score(model, policy, attention_mask=mask)
    assert inputs.sparse_pass.real.sum(1).eq(5).all()
    torch.testing.assert_close(padded[:, :5], alone, rtol=1e-5, atol=1e-6)


def test_random_sets_change_with_the_optimizer_step_and_repeat(monkeypatch):
    model = make_model("llama")
    lemo = apply_lemo(model, LeMoConfig(policy="random", block_size=8, agree_across_layers=False))

    def sets(step):
        lemo.passes.global_step = step
        with recorded_sets(monkeypatch) as chosen:
            model(**batch()).loss.backward()
        return torch.stack([mask for _, mask in chosen])

    assert torch.equal(sets(0), sets(0))
    assert not torch.equal(sets(0), sets(1))
    assert not torch.equal(*sets(0)[:2]) and not torch.equal(*sets(0)[0])


def test_agreeing_layers_keep_what_the_first_of_them_chose(monkeypatch):
    model = make_model("llama")
    config = LeMoConfig(block_size=8, policy="random", dense_first_layers=1)
    apply_lemo(model, config)
    with recorded_sets(monkeypatch) as agreed:
        model(**batch())
    assert len(agreed) == 3 and all(torch.equal(agreed[0][1], mask) for _, mask in agreed)
    remove_lemo(model)
    apply_lemo(model, dataclasses.replace(config, agree_across_layers=False))
    with recorded_sets(monkeypatch) as own:
        model(**batch())
    assert torch.equal(own[0][1], agreed[0][1])
    blocks = model._lemo.passes.tally.kept_blocks
    assert list(blocks) == [(i, name) for i in (1, 2, 3) for name in ("attention", "mlp")]
    for layer, (_, mask) in zip((1, 2, 3), own, strict=True):
        assert torch.equal(blocks[layer, "mlp"], mask[:, ::8])
    assert not all(torch.equal(own[0][1], mask) for _, mask in own)


def test_predictors_see_the_normed_stream_of_each_layer(monkeypatch):
    """They get every row before elimination, without grad, and their best blocks are kept."""
    seen = []

    class Wants(BlockPredictor):
        def __init__(self, wanted):
            super().__init__(32, 8, rank=2)
            self.wanted = wanted
            torch.nn.init.zeros_(self.weight.weight)

        def score(self, projected, index, asks, documents=None):
            seen.append((projected.keys.shape, torch.is_grad_enabled()))
            weights = projected.weights.flatten(1)[:, : batch()["input_ids"].shape[1]]
            assert torch.equal(weights, rarity(batch()["input_ids"]))
            scores = super().score(projected, index, asks, documents)
            scores[:, self.wanted] = scores.max() + 1
            return scores

    model = make_model("llama")
    config = LeMoConfig(policy="predictor", retention=0.3, block_size=8, agree_across_layers=False)
    apply_lemo(model, config, predictors=[Wants(i + 2) for i in range(4)])
    with recorded_sets(monkeypatch) as chosen:
        model(**batch())
    assert seen == [((2, 9, 8, 2), False)] * 4
    for index, (_, keep_mask) in enumerate(chosen):
        expected = [0, index + 2, 8]
        assert keep_mask[:, ::8].nonzero()[:, 1].tolist() == expected * 2
