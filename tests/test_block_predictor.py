"""The network, its losses, its pruning, and its training, against definitions and invariants."""

import math

import pytest
import torch
from models import make_model

from lemo_hf import LeMoConfig
from lemo_hf.observe import observe
from lemo_hf.policies import POLICIES
from lemo_hf.predictors import block_predictor
from lemo_hf.predictors.block_predictor import BlockPredictor, Embedded
from lemo_hf.predictors.fit import LOSSES, UNITS, Fit
from lemo_hf.recall import recall, recall_table
from lemo_hf.train_predictor import PredictorTraining, train_predictor


def network(**options) -> BlockPredictor:
    options = {"units": 6, "rank": 3, "longest": 16, **options}
    predictor = BlockPredictor(12, 4, **options)
    generator = torch.Generator().manual_seed(0)
    predictor.init_weights(generator)
    for table in ("earlier", "later", "distance"):
        if hasattr(predictor, table):
            torch.nn.init.normal_(getattr(predictor, table), generator=generator)
    return predictor.requires_grad_(False)


def by_definition(net: BlockPredictor, rows: torch.Tensor) -> list[float]:
    """Scores of one row without padding, one pair of blocks after the other."""
    blocks = rows.split(4)

    def table(name, count):
        values, place = getattr(net, name), math.log2(1 + min(count, net.longest))
        low = min(int(place), len(values) - 2)
        return float(values[low] + (place - low) * (values[low + 1] - values[low]))

    units = [net.embed(block).relu() for block in blocks]
    queries = [net.query(u.mean(0)) for u in units]
    scores = []
    for n, u in enumerate(units):
        later, earlier = len(blocks) - n, n + 1
        wants = range(n + 1) if net.causal else range(n, len(blocks))
        terms = [
            float((net.key(u) @ queries[m]).max()) + table("distance", abs(m - n)) for m in wants
        ]
        score = math.log(sum(map(math.exp, terms)))
        score -= math.log(len(terms)) if net.normalize else 0
        score += table("earlier", earlier)
        scores.append(score + (0 if net.causal else table("later", later)))
    return scores


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"normalize": True, "causal": True}])
def test_scores_are_those_of_the_definition(options, monkeypatch):
    net, rows = network(**options), torch.randn(1, 22, 12)
    expected = torch.tensor(by_definition(net, rows[0]))
    torch.testing.assert_close(net(rows)[0], expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(block_predictor, "PAIRS", 1)  # one key block at a time
    parts = [net.embed_rows(part) for part in rows.split(8, 1)]
    torch.testing.assert_close(net.score(Embedded.join(parts))[0], expected, rtol=1e-5, atol=1e-5)


def test_padding_and_other_documents_change_nothing():
    net, row = network(), torch.randn(1, 16, 12)
    alone = net(row)
    padded = torch.cat([torch.randn(1, 8, 12), row], 1)
    valid = torch.arange(24)[None] >= 8
    torch.testing.assert_close(net(padded, valid)[:, 2:], alone)
    assert net(padded, valid)[:, :2].isinf().all()
    documents = torch.tensor([[0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(net(padded, documents=documents)[:, 2:], alone)


def test_causal_scores_do_not_see_what_comes_later():
    rows = torch.randn(1, 24, 12)
    changed = rows.clone()
    changed[:, 12:] = 5
    for causal in (True, False):
        net = network(normalize=True, causal=causal)
        assert torch.equal(net(rows)[:, :3], net(changed)[:, :3]) == causal
    with pytest.raises(ValueError, match="normalize=True"):
        network(causal=True)


@pytest.mark.parametrize("head", ["attention", "mlp"])
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_a_ranking(loss, head):
    rows = torch.randn(4, 40, 12)
    target = (rows[..., 0].unflatten(1, (10, 4)).amax(2)).exp()
    predictor = network(head=head, rank=3 if head == "attention" else 1, units=16)
    fit = Fit(predictor.requires_grad_(True), 1e-2, loss)
    before = recall(predictor(rows), target, 0.5).mean()
    for _ in range(150):
        fit.backward(rows, target)
        fit.step(1e-2)
    assert recall(predictor(rows), target, 0.5).mean() > max(0.9, before)


def test_pruning_dead_units_changes_no_score_and_no_later_step():
    rows, target = torch.randn(2, 24, 12), torch.rand(2, 6)
    fits = []
    for prune in (False, True):
        predictor = network().requires_grad_(True)
        with torch.no_grad():
            predictor.embed.bias[[1, 4]] = -100.0
        fit = Fit(predictor, 1e-2)
        for step in range(4):
            fit.backward(rows, target)
            if step == 2 and prune:
                fit.optimizer.zero_grad()
                assert fit.prune(0.01) == 2 and predictor.units == predictor.sizes["units"] == 4
                assert all(
                    p.shape[UNITS[n]] == 4 for n, p in predictor.named_parameters() if n in UNITS
                )
                fit.backward(rows, target)
            fit.step(1e-2)
        fits.append(fit)
    torch.testing.assert_close(fits[1].predictor(rows), fits[0].predictor(rows))
    assert fits[1].prune(2.0) == 3 and fits[1].predictor.units == 1  # one unit stays


def test_recall_counts_the_oracle_s_blocks():
    target = torch.tensor([[0.0, 4, 3, 2, 1, 0]])
    assert recall(target, target, 0.5).item() == 1
    # Both keep the ends and one more: 1 by the target, 4 by these scores.
    assert recall(-target, target, 0.5).item() == pytest.approx(2 / 3)


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


ROWS = [torch.randint(3, 60, (48,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
HOW = PredictorTraining(block_size=8, units=8, rank=4, epochs=2, batch_size=2, rarely=0.3)


def test_training_leaves_the_model_alone_and_beats_chance():
    model = make_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predictor = train_predictor(
        model, ROWS, PredictorTraining(**{**vars(HOW), "heads": ("attention", "mlp"), "epochs": 20})
    )
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    table = recall_table(model, predictor, {"rows": ROWS}, retentions=(0.5,))
    means = {(row["head"], row["policy"]): row["mean"] for row in table}
    for head in ("attention", "mlp"):
        assert means[head, "predictor"] > means[head, "random"] + 0.05


def test_an_interrupted_training_ends_where_it_would_have(tmp_path, monkeypatch):
    model = make_model("llama")
    whole = train_predictor(model, ROWS, HOW)
    calls = []

    def interrupted(inputs, oracle=POLICIES["oracle"]):
        calls.append(inputs.layer_index)
        if len(calls) > 7 * model.config.num_hidden_layers:
            raise KeyboardInterrupt
        return oracle(inputs)

    with monkeypatch.context() as patch:
        patch.setitem(POLICIES, "oracle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_predictor(model, ROWS, HOW, output_dir=tmp_path, save_steps=3)
    resumed = train_predictor(model, ROWS, HOW, output_dir=tmp_path, save_steps=3)
    assert whole.same_as(resumed)
    other = PredictorTraining(**{**vars(HOW), "loss": "regression"})
    with pytest.raises(ValueError, match="of a training with other training"):
        train_predictor(model, ROWS, other, output_dir=tmp_path)


def test_rows_that_cannot_be_trained_on_are_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match="one length"):
        train_predictor(model, [*ROWS, ROWS[0][:40]], HOW)
    with pytest.raises(ValueError, match="fewer than two blocks of 64"):
        train_predictor(model, ROWS, PredictorTraining())
    with pytest.raises(ValueError, match="fewer than one step takes"):
        train_predictor(model, ROWS[:1], HOW)
