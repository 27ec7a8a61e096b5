"""The network and its training, against definitions and invariants."""

import math

import pytest
import torch
from support.models import make_model
from support.predictor_training import HOW, ROWS

from lemo_hf import LeMoConfig
from lemo_hf.core.observe import observe
from lemo_hf.core.policies import oracle_shares
from lemo_hf.predictors import block_predictor
from lemo_hf.predictors.asked_shares import asking_index
from lemo_hf.predictors.block_predictor import BlockPredictor, Projected
from lemo_hf.predictors.rarity import rarity
from lemo_hf.tune import looked_at
from lemo_hf.tune.looked_at import LookedAt, collate
from lemo_hf.tune.recall import recall, recall_table
from lemo_hf.tune.train_predictor import (
    PredictorTraining,
    remove_state,
    share_loss,
    train_predictor,
)

STRETCHED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def network(seed=0) -> BlockPredictor:
    predictor = BlockPredictor(12, 4, rank=3)
    generator = torch.Generator().manual_seed(seed)
    predictor.init_weights(generator)
    for parameter in (predictor.query.bias, predictor.key.bias, predictor.weight.weight):
        torch.nn.init.normal_(parameter, generator=generator)
    return predictor.requires_grad_(False)


def by_definition(net: BlockPredictor, rows, ids, asking: list[int]) -> list[float]:
    """Scores of one row without padding, one token after the other."""
    blocks, tokens = rows.split(4), ids.split(4)
    scores = [0.0] * len(blocks)
    for m in asking:
        rare = torch.tensor([1 / ids.tolist().count(x) for x in tokens[m].tolist()])
        weights = net.weight(blocks[m])[:, 0].exp() * rare
        weights = weights / weights.sum()
        for row, weight in zip(blocks[m], weights, strict=True):
            query = torch.nn.functional.normalize(net.query(row), dim=0)
            match = [
                float((torch.nn.functional.normalize(net.key(blocks[n]), dim=1) @ query).max()) * 16
                for n in range(1, m)
            ]
            for n, share in enumerate(torch.tensor(match).softmax(0).tolist(), 1):
                scores[n] += float(weight) * share
    return scores


def everyone(blocks, batch=1):
    return asking_index(torch.ones(batch, blocks, dtype=torch.bool), blocks)


def test_scores_are_those_of_the_definition(monkeypatch):
    net, rows = network(), torch.randn(1, 22, 12)
    index, asks = torch.tensor([[2, 5, 0]]), torch.tensor([[True, True, False]])
    ids = torch.randint(0, 9, (1, 22), generator=torch.Generator().manual_seed(1))
    expected = torch.tensor(by_definition(net, rows[0], ids[0], [2, 5]))
    rare = rarity(ids)
    torch.testing.assert_close(net(rows, index, asks, rare=rare)[0], expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(block_predictor, "PAIRS", 1)  # one asking block at a time
    parts = [net.project(part) for part in rows.split(8, 1)]
    got = net.score(Projected.join(parts).weighed(rare), index, asks)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert expected.sum() == pytest.approx(2)  # a unit each


def test_rarity_is_counted_within_a_document_and_without_padding():
    ids = torch.tensor([[5, 5, 7, 5, 7, 0], [0, 0, 3, 3, 3, 9]])
    times = torch.tensor([[3.0, 3, 2, 3, 2, 1], [2, 2, 3, 3, 3, 1]])
    torch.testing.assert_close(rarity(ids), -times.log())
    valid = torch.tensor([[True] * 5 + [False], [False] + [True] * 5])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    times = torch.tensor([[2.0, 2, 1, 1, 1, 1], [1, 1, 2, 2, 1, 1]])
    found = rarity(ids, valid, documents)
    torch.testing.assert_close(found[valid], -times.log()[valid])


def test_padding_and_other_documents_change_nothing():
    net, row = network(), torch.randn(1, 16, 12)
    alone = net(row, *everyone(4))
    padded = torch.cat([torch.randn(1, 8, 12), row], 1)
    valid = torch.arange(24)[None] >= 8
    index, asks = torch.tensor([[2, 3, 4, 5]]), torch.ones(1, 4, dtype=torch.bool)
    got = net(padded, index, asks, valid)
    torch.testing.assert_close(got[:, 2:], alone)
    assert (got[:, :2] == 0).all()
    documents = torch.tensor([[0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(net(padded, index, asks, documents=documents)[:, 2:], alone)


def test_what_comes_later_changes_no_share():
    net, rows = network(), torch.randn(1, 24, 12)
    changed = rows.clone()
    changed[:, 16:] = 5
    index, asks = torch.tensor([[2, 3]]), torch.ones(1, 2, dtype=torch.bool)
    assert torch.equal(net(rows, index, asks), net(changed, index, asks))


def test_a_network_that_learned_nothing_finds_what_is_like():
    net = BlockPredictor(64, 4, rank=32)
    net.init_weights(torch.Generator().manual_seed(0))
    rows = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    rows[0, 37] = rows[0, 22]
    scores = net(rows, torch.tensor([[9]]), torch.tensor([[True]]))
    assert scores.argmax() == 22 // 4


def test_the_loss_is_least_at_the_target_and_leaves_out_what_is_not_seen():
    target = torch.tensor([[[0.5, 0.1, 0.3, 0.1]]])
    hidden = torch.tensor([[[-1e9, 0.0, 0.0, -1e9]]])
    best = hidden + torch.tensor([0.0, 0.25, 0.75, 1.0]).log().nan_to_num(neginf=0)
    least = share_loss(best, target)
    assert least == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    other = hidden + torch.tensor([0.0, 0.4, 0.6, 1.0]).log().nan_to_num(neginf=0)
    assert share_loss(other, target) > least


def test_recall_counts_the_oracle_s_blocks():
    target = torch.tensor([[0.0, 4, 3, 2, 1, 0]])
    assert recall(target, target, 0.5).item() == 1
    # Both keep the ends and one more: 1 by the target, 4 by these scores.
    assert recall(-target, target, 0.5).item() == pytest.approx(2 / 3)
    required = torch.tensor([[True, False, True, False, False, True]])
    assert recall(-target, target, 0.5, required).item() == 1  # nothing is left to choose


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "opt"])
def test_what_is_observed_is_what_the_layers_read(family):
    """By sublayer, in order, with the streams that a plain forward has."""
    model = make_model(family).eval()
    ids = torch.randint(3, 60, (2, 40))
    seen = {}
    sublayers = ("attention", "mlp")
    observe(
        model,
        LeMoConfig(block_size=8),
        ids,
        lambda inputs: seen.__setitem__((inputs.layer_index, inputs.sublayer), inputs.x.clone()),
        sublayers=sublayers,
    )
    layers = range(model.config.num_hidden_layers)
    assert list(seen) == [(i, name) for i in layers for name in sublayers]
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    for i in layers:
        torch.testing.assert_close(seen[i, "attention"], hidden[i])
        assert not torch.equal(seen[i, "mlp"], seen[i, "attention"])


CONFIG = LeMoConfig(policy="oracle", block_size=8)


def labelled(row, start=40):
    return {"input_ids": row, "labels": torch.where(torch.arange(len(row)) < start, -100, row)}


def test_blocks_with_labels_ask_and_the_target_is_the_mean_of_the_upper_layers():
    model = make_model("llama").eval()
    batch = collate([labelled(ROWS[0]), labelled(ROWS[1][:37], 30)], torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == [48, 37]
    assert (batch["targets"] != -100).sum(1).tolist() == [8, 7]
    seen = LookedAt(model, CONFIG, batch, range(4))
    assert seen.index[seen.asks].tolist() == [4, 5, 3, 4]
    each = [
        torch.cat(list(oracle_shares(x, seen.index, seen.asks)), 1) for x in seen.streams.values()
    ]
    torch.testing.assert_close(seen.target, (each[2] + each[3]) / 2)
    torch.testing.assert_close(seen.target.sum(2), seen.asks.float())
    assert not torch.allclose(each[0], each[3])


def test_rows_without_a_label_ask_with_random_blocks(monkeypatch):
    model = make_model("llama").eval()
    batch = collate(ROWS[:2], torch.device("cpu"))
    draws = [LookedAt(model, CONFIG, batch, [3], 3, [i, 5]) for i in (0, 0, 1)]
    assert draws[0].index.shape == (2, 3) and draws[0].asks.all()
    assert torch.equal(draws[0].index, draws[1].index)
    changed = draws[0].index != draws[2].index
    assert changed[0].any() and not changed[1].any()  # a row's draw is its own
    assert (draws[0].index.diff(dim=1) > 0).all()


@pytest.mark.parametrize("rows", [ROWS, [labelled(row, 42) for row in ROWS]], ids=["all", "end"])
def test_training_leaves_the_model_alone_and_beats_chance(rows):
    model = make_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = PredictorTraining(**{**vars(HOW), "layers": (0, 2), "epochs": 15})
    predictor = train_predictor(model, rows, how)
    assert predictor.known == [0, 2] and predictor.info.base.fingerprint
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    policies = ("random", "pooled", "recent", *(() if rows is ROWS else ("overlap",)))
    table = recall_table(model, predictor, {"rows": rows}, (0.5,), ("overlap", *policies[:3]))
    found = {(row["layer"], row["policy"]): row["recall"] for row in table}
    assert set(found) == {(i, p) for i in (0, 2) for p in ("predictor", "untrained", *policies)}
    for layer in (0, 2):
        assert found[layer, "predictor"] > found[layer, "random"] + 0.02


def test_by_default_nothing_is_learned_and_tokens_look_for_their_like():
    model = make_model("llama")
    row = ROWS[0].clone()
    row[17:23] = row[41:47]  # block 2 holds what block 5 does
    rows = [labelled(row)]
    assert train_predictor(model, rows, PredictorTraining(block_size=8)).known == [2]
    network = train_predictor(model, rows, PredictorTraining((0,), block_size=8)).layers[0]
    assert torch.equal(network.query.weight, network.key.weight)
    seen = LookedAt(model, CONFIG, collate(rows, torch.device("cpu")), [0])
    read = seen.rows(0)
    assert network.rank == 32  # no more than the model's hidden size
    torch.testing.assert_close(network.key(read).mean((0, 1)), torch.zeros(32))  # it is centred
    index, asks = torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool)
    scores = network(read, index, asks)
    assert scores.argmax() == 2
    torch.testing.assert_close(scores, network.untrained(read)(read, index, asks))


def test_an_interrupted_training_ends_where_it_would_have(tmp_path, monkeypatch):
    model = make_model("llama")
    whole = train_predictor(model, ROWS, HOW)
    calls = []

    def interrupted(*args, shares=looked_at.oracle_shares):
        calls.append(args)
        if len(calls) > 7 * 2:  # the upper half of four layers
            raise KeyboardInterrupt
        return shares(*args)

    with monkeypatch.context() as patch:
        patch.setattr(looked_at, "oracle_shares", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_predictor(model, ROWS, HOW, output_dir=tmp_path, save_steps=3)
    path = tmp_path / "training_state" / "state.safetensors"
    begun = path.read_bytes()
    other = PredictorTraining(**{**vars(HOW), "asking": 5})
    with pytest.raises(ValueError, match="belongs to a training with other training"):
        train_predictor(model, ROWS, other, output_dir=tmp_path)
    with pytest.raises(ValueError, match="belongs to a training with other dataset: dataset was"):
        train_predictor(model, [*ROWS[1:], ROWS[0]], HOW, output_dir=tmp_path)
    asked = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ROWS]
    with pytest.raises(ValueError, match="belongs to a training with other dataset"):
        train_predictor(model, asked, HOW, output_dir=tmp_path)
    stretched = make_model("llama", rope_parameters=STRETCHED)
    stretched.load_state_dict(model.state_dict())
    changed = make_model("llama")
    changed.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1  # which no fingerprint samples
    for another in (stretched, changed):
        with pytest.raises(ValueError, match="belongs to a training with other model: model was"):
            train_predictor(another, ROWS, HOW, output_dir=tmp_path)
    assert path.read_bytes() == begun
    path.write_bytes(begun[:-1])
    with pytest.raises(ValueError, match="is damaged .* delete it to start anew"):
        train_predictor(model, ROWS, HOW, output_dir=tmp_path)
    path.write_bytes(begun)
    resumed = train_predictor(model, ROWS, HOW, output_dir=tmp_path, save_steps=3)
    assert whole.same_as(resumed)


def test_a_training_that_has_ended_stands_in_no_other_ones_way(tmp_path, caplog):
    model, rows = make_model("llama"), ROWS[::-1]
    first = train_predictor(model, ROWS, HOW, output_dir=tmp_path)
    with torch.no_grad():
        handle = model.register_forward_pre_hook(lambda *_: pytest.fail("it was trained again"))
        assert train_predictor(model, ROWS, HOW, output_dir=tmp_path).same_as(first)
        handle.remove()
    assert not caplog.records
    found = train_predictor(model, rows, HOW, output_dir=tmp_path)
    assert "belongs to another training, which has ended (dataset was" in caplog.text
    assert found.same_as(train_predictor(model, rows, HOW)) and not found.same_as(first)
    remove_state(tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_that_cannot_be_trained_on_are_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match="a row of 16 tokens holds fewer than three blocks of 8"):
        train_predictor(model, [*ROWS, ROWS[0][:16]], HOW)
    with pytest.raises(ValueError, match="fewer than three blocks of 64"):
        train_predictor(model, ROWS, PredictorTraining())
    with pytest.raises(ValueError, match="fewer than one step takes"):
        train_predictor(model, ROWS[:1], HOW)
    with pytest.raises(ValueError, match=r"layers=\(4,\): the model has layers 0 to 3"):
        train_predictor(model, ROWS, PredictorTraining(**{**vars(HOW), "layers": (4,)}))
