"""`LeMoDPOTrainer` in place of TRL's DPOTrainer."""

import pytest
import torch
from support.dense_reference import recorded_sets

trl = pytest.importorskip("trl", minversion="1.16")

from support.dpo import (  # noqa: E402
    FULL,
    HALF,
    MODELS,
    batch_of,
    dense_logps,
    gradients_of,
    logs,
    make_trainer,
    model,
    moved_on,
    one_step,
    other,
    preferences,
    sigmoid_loss,
)
from trl.trainer.utils import use_adapter  # noqa: E402

from lemo_hf import LeMoConfig  # noqa: E402
from lemo_hf.patch import lemo_of  # noqa: E402


def assert_same_logs(ours, theirs, rel=1e-5):
    assert len(ours) == len(theirs) == 3
    for mine, stock in zip(ours, theirs, strict=True):
        for name in stock.keys() - {"epoch", "step"}:
            assert mine[name] == pytest.approx(stock[name], rel=rel, abs=rel), name


# What trains is the same with an adapter that TRL makes and with one that is there.
SOME = [pytest.param(x, marks=pytest.mark.soak if x == "new-adapter" else ()) for x in MODELS]
SETTINGS = {
    "plain": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True},
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.mark.parametrize(
    ("models", "settings"),
    [(name, "plain") for name in MODELS]
    + [("new-adapter", "precomputed"), ("ref_model", "precomputed"), ("adapter", "checkpointing")]
    + [("ref_model", "synced")],
)
def test_retention_1_logs_what_dpo_trainer_does(tmp_path, models, settings):
    settings = SETTINGS[settings]
    stock = logs(make_trainer(tmp_path, cls=trl.DPOTrainer, **MODELS[models](), **settings))
    ours = logs(make_trainer(tmp_path, FULL, **MODELS[models](), **settings))
    assert_same_logs(ours, stock)
    assert ours[0]["lemo/attention_retention"] == 1


def test_no_config_is_dpo_trainer_to_the_bit(tmp_path):
    stock = logs(make_trainer(tmp_path, cls=trl.DPOTrainer))
    ours = logs(make_trainer(tmp_path))
    assert_same_logs(ours, stock, rel=0)
    assert ours[0].keys() == stock[0].keys()


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)


LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def test_retention_1_has_every_loss_and_its_gradients(tmp_path):
    options = {"label_smoothing": 0.1}
    stock = moved_on(make_trainer(tmp_path, cls=trl.DPOTrainer, **options))
    ours = moved_on(make_trainer(tmp_path, FULL, **options))
    ways = [{"loss_types": [name]} for name in LOSSES]
    ways += [{"loss_types": ["sigmoid"], "ld_alpha": 0.5}, {"f_divergence_type": "js_divergence"}]
    seen = set()
    for way in ways:
        for trainer in (stock, ours):
            vars(trainer).update(way)
        loss, figures, gradients = one_step(stock, batch_of(stock, 2))
        mine, my_figures, my_gradients = one_step(ours, batch_of(ours, 2))
        seen.add(round(loss, 6))
        assert mine == pytest.approx(loss, rel=1e-5), way
        assert my_figures == pytest.approx(figures, rel=1e-5, abs=1e-5)
        assert_same_gradients(my_gradients, gradients)
    assert len(seen) > 12  # a loss that did not change would say nothing


def test_retention_1_weighs_pairs_as_wpo_does(tmp_path):
    stock = moved_on(make_trainer(tmp_path, cls=trl.DPOTrainer, use_weighting=True))
    ours = moved_on(make_trainer(tmp_path, FULL, use_weighting=True))
    assert one_step(ours)[0] == pytest.approx(one_step(stock)[0], rel=1e-5)


CONFIGS = {
    "auto": HALF,
    "small": LeMoConfig(retention=0.2, block_size=8, policy="overlap"),
    "random": LeMoConfig(retention=0.5, block_size=8, policy="random", agree_across_layers=False),
    "window": LeMoConfig(retention=0.4, block_size=8, policy="window"),
    "pooled": LeMoConfig(retention=0.5, block_size=8, policy="pooled", agree_across_layers=False),
    "mlp": LeMoConfig(retention=0.5, mlp_retention=0.7, block_size=8, policy="pooled"),
    "threshold": LeMoConfig(threshold=1.2, block_size=8, agree_across_layers=False),
}


@pytest.mark.parametrize(
    ("config", "models"),
    [(name, "adapter") for name in CONFIGS]
    + [("auto", "new-adapter"), ("auto", "ref_model"), ("pooled", "ref_model")],
)
def test_equals_masked_dense_models(tmp_path, monkeypatch, config, models):
    """Policy and reference, both with the sets of the policy's pass: losses and gradients."""
    trainer = moved_on(make_trainer(tmp_path, CONFIGS[config], **MODELS[models]()))
    batch = batch_of(trainer)
    with recorded_sets(monkeypatch) as chosen:
        loss, figures, found = one_step(trainer, batch)
    policy, reference = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    for (_, mine), (_, theirs) in zip(policy, reference, strict=True):
        assert torch.equal(mine, theirs)
    attention = [mask for name, mask in policy if name == "attention"]
    mlp = [mask for name, mask in policy if name == "mlp"] or attention
    for mask in (*attention, *mlp):
        assert_pairs(mask, batch)
    assert any(not torch.equal(mask, batch["attention_mask"].bool()) for mask in attention)

    masks = list(zip(attention, mlp, strict=True))
    inner = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    trainer.model.zero_grad()
    logps = dense_logps(trainer.model, inner.model.layers, batch, masks)
    with torch.no_grad():
        if models == "ref_model":
            layers = trainer.ref_model.model.layers
            expected = dense_logps(trainer.ref_model, layers, batch, masks)
        else:
            name = "ref" if "ref" in trainer.model.peft_config else None
            with use_adapter(trainer.model, name):
                expected = dense_logps(trainer.model, inner.model.layers, batch, masks)
    wanted = sigmoid_loss(logps, expected)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    ratios = (logps - expected).detach().chunk(2)
    assert figures["rewards/chosen"] == pytest.approx(0.1 * float(ratios[0].mean()), rel=1e-4)
    assert figures["rewards/rejected"] == pytest.approx(0.1 * float(ratios[1].mean()), rel=1e-4)
    assert_same_gradients(found, gradients_of(trainer))


def assert_pairs(mask, batch):
    """Completions and the token before each are whole; the pair keeps the same of its prompt."""
    completion, half = batch["completion_mask"].bool(), len(mask) // 2
    assert mask[completion].all() and not mask[~batch["attention_mask"].bool()].any()
    for row in range(half):
        begin = int(completion[row].int().argmax())
        assert begin == int(completion[half + row].int().argmax())
        assert mask[row, begin - 1] and mask[half + row, begin - 1]
        assert torch.equal(mask[row, :begin], mask[half + row, :begin])


def test_precomputed_references_have_read_what_trains(tmp_path):
    """Nothing is learned, so every reward is 0 if the reference has read the same: in batches that
    are padded otherwise, in another order, at any step."""
    settings = {
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 3,
        "learning_rate": 0.0,
        "max_steps": 8,
    }
    for models in ("new-adapter", "ref_model"):
        options = MODELS[models]()
        if models == "ref_model":
            options["ref_model"] = model(lora=False).eval()
        found = logs(make_trainer(tmp_path, HALF, **options, **settings))
        assert len(found) == 8 and found[0]["lemo/attention_retention"] < 0.7
        for log in found:
            assert log["rewards/chosen"] == pytest.approx(0, abs=2e-5)
            assert log["rewards/rejected"] == pytest.approx(0, abs=2e-5)
            assert log["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_precomputed_references_lie_in_files_of_their_own(tmp_path):
    """TRL finds what it has computed by the data and the weights, which are the same here."""
    data = preferences()
    data.save_to_disk(tmp_path / "data")
    data = data.load_from_disk(tmp_path / "data")
    columns = {}
    for name, config in {"dense": None, "half": HALF, "again": None, "all": FULL}.items():
        options = {"precompute_ref_log_probs": True, "train_dataset": data, "eval_dataset": data}
        trainer = make_trainer(tmp_path, config, **MODELS["new-adapter"](), **options)
        columns[name] = torch.tensor(trainer.train_dataset["ref_chosen_logps"])
        # Evaluation is dense, and so is its reference.
        held_out = torch.tensor(trainer.eval_dataset["ref_chosen_logps"])
        torch.testing.assert_close(held_out, columns["dense"], rtol=1e-5, atol=0)
        assert lemo_of(trainer.model) is trainer.lemo
    assert torch.equal(columns["dense"], columns["again"])
    torch.testing.assert_close(columns["all"], columns["dense"], rtol=1e-5, atol=0)
    assert (columns["half"] - columns["dense"]).abs().max() > 0.1


@pytest.mark.parametrize("models", SOME)
def test_evaluation_is_dense(tmp_path, models):
    settings = {"eval_dataset": preferences(4), "max_steps": 1, "learning_rate": 0.0}
    stock, ours = (
        make_trainer(tmp_path, *config, **MODELS[models](), **settings, **cls)
        for config, cls in (((), {"cls": trl.DPOTrainer}), ((HALF,), {}))
    )
    expected = stock.evaluate()
    for when in ("before", "after"):
        if when == "after":
            ours.train()
        found = ours.evaluate()
        for name in expected:
            if name.startswith(("eval_loss", "eval_rewards", "eval_log")):
                assert found[name] == pytest.approx(expected[name], abs=1e-6), (when, name)


@pytest.mark.parametrize("models", SOME)
def test_half_of_the_tokens_learns(tmp_path, models):
    settings = {"max_steps": 12, "learning_rate": 2e-3, "lr_scheduler_type": "constant"}
    found = logs(make_trainer(tmp_path, HALF, **MODELS[models](), **settings))
    assert sum(log["loss"] for log in found[-4:]) < sum(log["loss"] for log in found[:4])
    assert 0.4 < found[0]["lemo/attention_retention"] < 0.9


def test_checkpointing_and_padding_free_change_nothing(tmp_path):
    """TRL 1.16 takes padding_free=True for False, and says so."""
    plain = logs(make_trainer(tmp_path, HALF))
    for settings in ({"gradient_checkpointing": True}, {"padding_free": True}):
        assert_same_logs(logs(make_trainer(tmp_path, HALF, **settings)), drop_speed(plain))


def drop_speed(found):
    return [{k: v for k, v in log.items() if "per_second" not in k} for log in found]


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.soak)],
)
def test_resumes_to_the_step(tmp_path, settings):
    """Blocks are kept by chance as well, others at each step."""
    settings = {**settings, **MODELS["new-adapter"](), "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, HALF, max_steps=4, **settings)
    expected = drop_speed(logs(whole))
    settings.update(MODELS["new-adapter"]())
    again = make_trainer(tmp_path / "again", HALF, max_steps=4, **settings)
    again.train(str(tmp_path / "checkpoint-2"))
    found = [log for log in again.state.log_history if "loss" in log]
    for mine, stock in zip(found[2:], expected[2:], strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm"):
            assert mine[name] == pytest.approx(stock[name], rel=1e-5, abs=1e-6), name
    for mine, stock in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-6)


def test_the_finish_is_dense_for_both(tmp_path, monkeypatch):
    """Only if the user asks for it: rows of preferences are never labelled throughout."""
    config = LeMoConfig(retention=0.5, block_size=8, dense_finish=0.34)
    found = logs(make_trainer(tmp_path, config))
    assert found[0]["lemo/attention_retention"] < 0.9
    assert found[-1]["lemo/attention_retention"] == 1
    assert logs(make_trainer(tmp_path, HALF))[-1]["lemo/attention_retention"] < 0.9


def test_the_files_of_a_run_are_the_policys(tmp_path):
    trainer = make_trainer(tmp_path, HALF, **other())
    logs(trainer)
    trainer.save_model()
    assert LeMoConfig.from_pretrained(tmp_path) == HALF
    assert {"trl", "dpo", "lemo-hf"} <= set(trainer.model.model_tags)


def test_a_pass_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C in the reference's pass: the next evaluation is dense."""
    trainer = make_trainer(tmp_path, HALF, **other())
    layer = trainer.ref_model.model.layers[2]
    handle = layer.mlp.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        one_step(trainer)
    handle.remove()
    assert lemo_of(trainer.ref_model).passes.current is None
    assert lemo_of(trainer.model).passes.pairs.latest is None
