"""The finish of a run: when it begins, what rows keep in it, and in which loops it happens."""

from dataclasses import replace

import pytest
import torch
from support.eager_graphs import use_eager_graphs
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from support.trainers import assert_same_weights, dataset, losses, make_trainer
from transformers import Trainer, TrainerCallback

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.graphs import cuda_graphs
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.patch import lemo_of

# Of 64 tokens 8 blocks, of which a sparse step keeps 3.
AUTO = LeMoConfig(block_size=8, chunk_size=16, segment_size=40)
SPARSE, DENSE = 0.375, 1.0


def retentions(trainer):
    """What each step has kept by its log."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["lemo/attention_retention"] == log["lemo/mlp_retention"] for log in logs)
    return [log["lemo/attention_retention"] for log in logs]


def trained(trainer, **train):
    trainer.train(**train)
    return retentions(trainer)


def with_callback(tmp_path, config, **arguments):
    callbacks = [LeMoCallback(config)]
    return make_trainer(tmp_path, None, cls=Trainer, callbacks=callbacks, **arguments)


@pytest.mark.parametrize(
    ("options", "steps", "begins"),
    [
        ({}, 10, 9),
        ({"dense_finish": 0.5}, 6, 3),
        ({"dense_finish": 0.25}, 6, 4),  # 1.5 steps are 2
        ({"dense_finish": 0.01}, 20, 19),  # who asks for a finish gets one step of it
        ({"dense_finish": 0}, 4, None),
        ({"dense_finish": 1}, 4, 0),
        ({"policy": "recent"}, 10, None),
        ({"policy": "recent", "dense_finish": 0.2}, 10, 8),
        ({"threshold": 1.0, "dense_finish": 0.2, "finish_retention": 0.6}, 10, 8),
        ({"dense_finish": 1}, None, None),  # nobody knows when the run ends
    ],
)
def test_when_it_begins(options, steps, begins):
    config = LeMoConfig(block_size=8, **options)
    lemo = apply_lemo(make_model("llama"), config)
    for step in range(20):
        lemo.begin_step(step, steps)
        assert lemo.passes.global_step == step
        inside = begins is not None and begins <= step
        assert lemo.passes.retention == (config.finish_retention if inside else None)


@pytest.mark.oldest
@pytest.mark.parametrize("make", [make_trainer, with_callback])
def test_it_counts_optimizer_steps(tmp_path, make):
    """Of three passes each; by epochs as well."""
    kept = []
    trainer = make(
        tmp_path,
        replace(AUTO, dense_finish=0.5),
        gradient_accumulation_steps=3,
        data=dataset(rows=12),
        max_steps=-1,
        num_train_epochs=2,
    )

    class Listen(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            passes = lemo_of(model).passes
            passes.tally.listeners.append(lambda seen: kept.append(seen.kept_blocks[0, "mlp"]))

    trainer.add_callback(Listen())
    assert trained(trainer) == [SPARSE] * 2 + [DENSE] * 2
    assert [float(blocks.float().mean()) for blocks in kept] == [SPARSE] * 6 + [DENSE] * 6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [SPARSE] * 3 + [DENSE]),  # a tenth of four steps is one
        ({"dense_finish": 0}, [SPARSE] * 4),
        ({"dense_finish": 1}, [DENSE] * 4),
        ({"dense_finish": 0.5, "finish_retention": 0.5}, [SPARSE] * 2 + [0.5] * 2),
        ({"policy": "recent"}, [SPARSE] * 4),
        ({"policy": "pooled", "dense_finish": 0.5}, [SPARSE] * 2 + [DENSE] * 2),
        ({"dense_finish": 0.5, "dense_first_layers": 2}, [(2 + 2 * SPARSE) / 4] * 2 + [DENSE] * 2),
    ],
    ids=str,
)
def test_logs_follow_it(tmp_path, options, expected):
    assert trained(make_trainer(tmp_path, replace(AUTO, **options))) == expected


@pytest.mark.parametrize("sets", [{"mlp_retention": 0.25}, {"agree_across_layers": False}])
def test_sets_of_their_own_are_whole_too(tmp_path, sets):
    trainer = make_trainer(tmp_path, replace(AUTO, dense_finish=0.5, **sets))
    trainer.train()
    assert all(blocks.all() for blocks in trainer.lemo.passes.tally.kept_blocks.values())
    first, *_, last = (log for log in trainer.state.log_history if "loss" in log)
    assert first["lemo/mlp_retention"] == sets.get("mlp_retention", SPARSE)
    assert last["lemo/mlp_retention"] == last["lemo/attention_retention"] == DENSE


@pytest.mark.oldest
@pytest.mark.parametrize("make", [make_trainer, with_callback])
def test_a_run_resumes_to_the_step(tmp_path, make):
    """From before the finish, from its beginning, and from within."""
    config = replace(AUTO, dense_finish=0.5)
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "whole", config, **arguments)
    expected = losses(whole)
    assert retentions(whole) == [SPARSE] * 3 + [DENSE] * 3
    for step in (2, 3, 5):
        resumed = make(tmp_path / f"from-{step}", config, **{**arguments, "save_strategy": "no"})
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert losses(resumed, resume_from_checkpoint=str(checkpoint)) == expected
        assert retentions(resumed) == retentions(whole)
        assert_same_weights(resumed, whole, rtol=0, atol=0)


def test_another_run_of_the_same_trainer_begins_sparse(tmp_path):
    trainer = make_trainer(tmp_path, replace(AUTO, dense_finish=0.25))
    assert trained(trainer)[-4:] == [SPARSE] * 3 + [DENSE]
    assert trained(trainer)[-4:] == [SPARSE] * 3 + [DENSE]


def test_sft_trainer(tmp_path):
    from support.sft import make_trainer as make_sft

    settings = {"max_steps": 4, "packing": True, "packing_strategy": "wrapped", "max_length": 64}
    found = trained(make_sft(tmp_path, replace(AUTO, dense_finish=0.5), **settings))
    assert max(found[:2]) <= 0.4 and found[2:] == [DENSE] * 2  # some rows are shorter
    # Completions: labels on a part, of which a finish that nobody asked for makes nothing.
    found = trained(make_sft(tmp_path, AUTO, kind="completion", max_steps=4))
    assert DENSE not in found
    explicit = replace(AUTO, dense_finish=0.25)
    found = trained(make_sft(tmp_path, explicit, kind="completion", max_steps=4))
    assert DENSE not in found[:3] and found[3] == DENSE


def test_axolotls_callback(tmp_path):
    pytest.importorskip("axolotl.integrations.base")
    from axolotl.utils.dict import DictDefault

    from lemo_hf.integrations.axolotl import LeMoPlugin

    keys = DictDefault(lemo={"block_size": 8, "dense_finish": 0.5, "finish_retention": 0.5})
    callbacks = LeMoPlugin().add_callbacks_pre_trainer(keys, model=None)
    trainer = make_trainer(tmp_path, None, cls=Trainer, callbacks=callbacks)
    assert trained(trainer) == [SPARSE] * 2 + [0.5] * 2


def test_rows_that_ask_are_spared_unless_it_is_asked_for(tmp_path):
    """12 answers and what predicts the first: 2 blocks, beside which a sparse step keeps one."""
    data = dataset(answers=12)
    found = trained(make_trainer(tmp_path, AUTO, data=data))
    assert found == [SPARSE] * 4
    for share, finish in ((1.0, DENSE), (0.5, 0.5)):
        config = replace(AUTO, dense_finish=0.25, finish_retention=share)
        assert trained(make_trainer(tmp_path, config, data=data)) == [SPARSE] * 3 + [finish]
    overlap = replace(AUTO, policy="overlap", dense_finish=0.25)
    assert trained(make_trainer(tmp_path, overlap, data=data)) == [SPARSE] * 3 + [DENSE]


def both_kinds():
    """A row whose labels cover its end, and one that is labelled throughout."""
    inputs = batch(rows=2, tokens=64)
    inputs["labels"][0, :52] = -100
    return inputs


@pytest.mark.parametrize(("share", "blocks"), [(1.0, 8), (0.5, 4)])
@pytest.mark.parametrize("explicit", [False, True])
def test_rows_of_both_kinds_in_one_batch(explicit, share, blocks):
    config = replace(
        AUTO, finish_retention=share, dense_finish=0.1 if explicit else None, random_share=0
    )
    model, inputs = make_model("llama"), both_kinds()
    lemo = apply_lemo(model, config)
    kept = []
    for step in (8, 9):
        lemo.begin_step(step, 10)
        loss = model(**inputs).loss
        kept.append(lemo.passes.tally.kept_blocks[3, "attention"])
    assert kept[0].sum(1).tolist() == [3, 3]
    assert kept[1].sum(1).tolist() == [blocks if explicit else 3, blocks]
    if explicit:
        return
    assert torch.equal(kept[1][0], kept[0][0])  # overlap draws nothing
    alone = [{name: x[i : i + 1] for name, x in inputs.items()} for i in range(2)]
    expected = [float(model(**row).loss) for row in alone]
    labels = [12, 63]
    mean = sum(n * x for n, x in zip(labels, expected, strict=True)) / sum(labels)
    assert float(loss) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp_retention": 0.25},
        {"policy": "pooled", "agree_across_layers": False, "retention": (0.25, 0.5, 0.5, 1.0)},
        {"retention": None, "policy": "pooled", "threshold": 1.0},
        {"recompute": "full"},
    ],
    ids=str,
)
def test_a_dense_finish_is_the_stock_models_step(options):
    model, inputs = with_lora(make_model("llama")), batch()
    expected, gradients = loss_and_gradients(model, **inputs)
    lemo = apply_lemo(model, replace(AUTO, dense_finish=0.5, **options))
    lemo.begin_step(0, 2)
    assert loss_and_gradients(model, **inputs)[0] != pytest.approx(expected, rel=1e-4)
    lemo.begin_step(1, 2)
    loss, found = loss_and_gradients(model, **inputs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert all(relative_error(found[name], gradients[name]) < 1e-4 for name in gradients)
    remove_lemo(model)


@pytest.mark.parametrize("make", [make_trainer, with_callback])
def test_the_lines_at_the_start_say_it(tmp_path, capsys, make):
    arguments = {"save_strategy": "steps", "save_steps": 1}
    make(tmp_path, AUTO, max_steps=10, **arguments).train()
    said = capsys.readouterr().out
    assert "The last 10% of the steps are dense for rows that are labelled throughout." in said
    why = "not 30%: shares are rounded up to whole 8-token blocks"
    row = f"LeMo: of a 64-token row (labels throughout) about 24 tokens (38%, {why}) "
    row += "train in each sparse "
    assert said.count(row) == 1
    assert f"{row}layer; the last 10% of the steps are dense." in said
    checkpoint = str(tmp_path / "checkpoint-9")  # in the finish, where no row is short of tokens
    make(tmp_path, AUTO, max_steps=10).train(resume_from_checkpoint=checkpoint)
    said = capsys.readouterr().out
    assert "The last 10% of the steps" in said and "-token row" not in said
    explicit = replace(AUTO, dense_finish=0.5, finish_retention=0.5)
    make(tmp_path, explicit, data=dataset(answers=12)).train()
    said = capsys.readouterr().out
    assert "The last 50% of the steps keep 50% of the blocks. " in said
    row = f"row (labels on 12 of them) about 24 tokens (38%, {why}) train in each sparse layer; "
    row += "the last 50"
    assert row in said
    make(tmp_path, AUTO, data=dataset(answers=12)).train()
    assert f"(38%, {why}) train in each sparse layer, in every step." in capsys.readouterr().out
    make(tmp_path, replace(AUTO, dense_finish=0)).train()
    said = capsys.readouterr().out
    assert "in every step." in said and "The last" not in said


def test_graphs_are_recorded_anew(monkeypatch):
    """Of each phase the first batch runs as ever, and the second is recorded."""
    use_eager_graphs(monkeypatch)
    recorded, capture = [], cuda_graphs.capture

    def counted(*args):
        recorded.append(step)
        return capture(*args)

    monkeypatch.setattr(cuda_graphs, "capture", counted)
    config = replace(AUTO, dense_finish=0.5, cuda_graphs=True)
    model, twin = make_model("llama", "sdpa"), make_model("llama", "sdpa")
    pairs = [
        (model, apply_lemo(model, config)),
        (twin, apply_lemo(twin, replace(config, cuda_graphs=False))),
    ]
    torch.manual_seed(3)
    for step in range(20):
        ids = torch.randint(3, 97, (2, 64))
        found = []
        for one, lemo in pairs:
            lemo.begin_step(step % 10, 10)
            one.zero_grad()
            loss = one(input_ids=ids, labels=ids).loss
            loss.backward()
            gradients = [p.grad for p in one.parameters()]
            found.append((loss.item(), lemo.passes.tally.kept_blocks[0, "mlp"], gradients))
        ours, expected = found
        assert ours[0] == pytest.approx(expected[0], rel=1e-5)
        assert torch.equal(ours[1], expected[1])
        assert float(ours[1].float().mean()) == (SPARSE if step % 10 < 5 else DENSE)
        for gradient, other in zip(ours[2], expected[2], strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)
    assert recorded == [1, 6, 11, 16]
    assert pairs[0][1].report() == pairs[1][1].report()


def test_graphs_through_trainer(monkeypatch, tmp_path):
    use_eager_graphs(monkeypatch)
    config, arguments = replace(AUTO, dense_finish=0.5), {"max_steps": 8}
    plain, ours = (
        make_trainer(tmp_path, how, model=with_lora(make_model("llama", "sdpa")), **arguments)
        for how in (config, replace(config, cuda_graphs=True))
    )
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-4)
    assert retentions(ours) == retentions(plain) == [SPARSE] * 4 + [DENSE] * 4


def test_an_mlp_that_chooses_for_itself_is_told_apart(tmp_path, capsys):
    own = replace(AUTO, mlp_retention=0.5, dense_finish=0)
    make_trainer(tmp_path, own, data=dataset(answers=12)).train()
    said = capsys.readouterr().out
    assert "tokens (38%, not 30%: shares are rounded up to whole 8-token blocks) train in " in said
    assert "the attention of each sparse layer and about 32 tokens (50%) in its MLP, in " in said
    dense = replace(own, retention=1.0)
    make_trainer(tmp_path, dense, data=dataset(answers=12)).train()
    said = capsys.readouterr().out
    assert "about 64 tokens (100%) train in the attention of each sparse layer and about 32" in said


def test_a_loss_outside_of_which_nothing_is_asked_is_0():
    """Kept blocks may hold no label: the count that the sum of 0 is divided by stays above 0."""
    from lemo_hf.core.labels import Labels
    from lemo_hf.core.sparse_pass import SparsePass

    tensor = torch.full((1, 32), -100)
    tensor[0, 9] = 5
    labels = Labels.copy_of(tensor, 4)
    sparse_pass = SparsePass(LeMoConfig(block_size=8), (1, 32), torch.device("cpu"))
    sparse_pass.times_kept[0, 16:] = 1  # not what predicts the label
    labels.strike(sparse_pass)
    assert (labels.tensor == -100).all() and labels.num_items.item() == 4
    kept = Labels.copy_of(tensor, 4)
    sparse_pass.times_kept[0, :16] = 1
    kept.strike(sparse_pass)
    assert kept.num_items.item() == 4 and kept.tensor[0, 9] == 5
