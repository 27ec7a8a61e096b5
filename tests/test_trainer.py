"""`LeMoTrainer` in place of `Trainer`: same losses, same files, same everything else."""

import json
import logging
from dataclasses import replace
from types import MethodType

import pytest
import torch
import transformers
from peft import PeftModel
from support.models import batch, make_model, with_lora
from support.trainers import FULL, SPARSE, assert_same_weights, dataset, losses, make_trainer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from lemo_hf import LeMoConfig
from lemo_hf.batch import row_counts
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.patch import transformers_model
from lemo_hf.trainer import LeMoMixin


@pytest.mark.oldest
def test_no_config_is_trainer_to_the_bit(tmp_path):
    plain = make_trainer(tmp_path, None, cls=Trainer)
    ours = make_trainer(tmp_path, None)
    assert losses(ours) == losses(plain)
    assert_same_weights(ours, plain, rtol=0, atol=0)
    assert ours.state.log_history[0].keys() == plain.state.log_history[0].keys()
    assert [type(m) for m in ours.model.modules()] == [type(m) for m in plain.model.modules()]


@pytest.mark.oldest
def test_operations_are_trainers_and_parameters_are_counted_once_a_run(tmp_path, monkeypatch):
    counted = []
    count = PreTrainedModel.num_parameters

    def counting(self, *args, **kwargs):
        counted.append(kwargs)
        return count(self, *args, **kwargs)

    plain = make_trainer(tmp_path, None, cls=Trainer)
    ours = make_trainer(tmp_path, FULL)
    plain.train()
    monkeypatch.setattr(PreTrainedModel, "num_parameters", counting)
    ours.train()
    assert ours.state.total_flos == plain.state.total_flos > 0
    assert counted.count({"exclude_embeddings": True}) == 1 < ours.state.global_step
    ours.train()
    assert counted.count({"exclude_embeddings": True}) == 2


@pytest.mark.oldest
def test_a_users_own_count_of_operations_stays(tmp_path):
    class Counts(Trainer):
        def floating_point_ops(self, inputs):
            return 1 + inputs["input_ids"].numel()

    class Both(LeMoMixin, Counts):
        pass

    trainer = make_trainer(tmp_path, FULL, cls=Both)
    long, short = ({"input_ids": torch.zeros(1, tokens)} for tokens in (64, 32))
    assert [trainer.floating_point_ops(x) for x in (long, short)] == [65, 33]
    trainer = make_trainer(tmp_path, FULL)
    assert trainer.floating_point_ops({"labels": torch.zeros(1, 4)}) == 0


@pytest.mark.oldest
@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_retention_1_trains_as_trainer_does(tmp_path, arguments):
    plain = make_trainer(tmp_path, None, cls=Trainer, **arguments)
    ours = make_trainer(tmp_path, FULL, **arguments)
    tolerance = 2e-2 if arguments.get("bf16") else 1e-5
    assert losses(ours) == pytest.approx(losses(plain), rel=tolerance)
    if not arguments.get("bf16"):
        assert_same_weights(ours, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.oldest
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("dense_first_layers", [0, 2])
def test_gradient_checkpointing_changes_nothing(tmp_path, kwargs, dense_first_layers):
    config = LeMoConfig(
        retention=0.5,
        block_size=8,
        policy="random",
        agree_across_layers=False,
        dense_first_layers=dense_first_layers,
    )
    plain = make_trainer(tmp_path, config)
    checkpointed = make_trainer(
        tmp_path, config, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-6)
    assert_same_weights(checkpointed, plain)
    assert checkpointed.model.get_base_model().model.layers[3].gradient_checkpointing


@pytest.mark.parametrize("answers", [None, 20])
@pytest.mark.parametrize("supervise", ["kept", "all"])
def test_accumulation_equals_a_larger_batch(tmp_path, supervise, answers):
    config = LeMoConfig(retention=0.5, block_size=8, policy="random", supervise=supervise)
    data = dataset(answers=answers)
    one = make_trainer(tmp_path, config, data=data, per_device_train_batch_size=4)
    four = make_trainer(
        tmp_path,
        config,
        data=data,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert_same_weights(four, one, rtol=1e-3, atol=1e-4)


@pytest.mark.oldest
@pytest.mark.parametrize("checkpointing", [False, True])
def test_resumed_training_goes_on_as_if_nothing_happened(tmp_path, checkpointing):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    arguments["gradient_checkpointing"] = checkpointing
    whole = make_trainer(tmp_path / "whole", SPARSE, **arguments)
    expected = losses(whole)
    resumed = make_trainer(tmp_path / "resumed", SPARSE, **arguments)
    again = losses(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again == expected  # the log history of the first three steps is restored
    assert_same_weights(resumed, whole, rtol=0, atol=0)


def test_resuming_with_another_config_is_said(tmp_path, caplog):
    make_trainer(tmp_path, SPARSE, save_strategy="steps", save_steps=2).train()
    for output, checkpoint in ((tmp_path / "b", str(tmp_path / "checkpoint-2")), (tmp_path, True)):
        caplog.clear()
        other = make_trainer(output, LeMoConfig(retention=0.5, block_size=16, policy="random"))
        with caplog.at_level(logging.WARNING):
            other.train(resume_from_checkpoint=checkpoint)
        assert "block_size=16 (was 8)" in caplog.text


def test_a_checkpoint_whose_config_is_refused_by_now_is_resumed(tmp_path, caplog):
    make_trainer(tmp_path, SPARSE, save_strategy="steps", save_steps=2).train()
    path = tmp_path / "checkpoint-2" / "lemo_config.json"
    saved = {**json.loads(path.read_text()), "dense_finish": 0.5, "finish_retention": 0.1}
    path.write_text(json.dumps(saved))
    resumed = make_trainer(tmp_path / "resumed", SPARSE)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(path.parent))
    assert resumed.state.global_step == 4
    assert "finish_retention=0.1 keeps less than" in caplog.text


@pytest.mark.oldest
def test_adapter_loads_without_lemo(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE)
    trainer.train()
    trainer.save_model()
    assert LeMoConfig.from_pretrained(tmp_path) == SPARSE
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    ids = torch.tensor([dataset()[0]["input_ids"]])
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, ours)
        merged = trainer.model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.oldest
def test_full_model_loads_without_lemo(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE, model=make_model("llama"))
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.tensor([dataset()[0]["input_ids"]])
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, ours)


@pytest.mark.oldest
def test_evaluation_is_dense(tmp_path):
    data = dataset(8)
    plain = make_trainer(tmp_path, None, cls=Trainer, eval_dataset=data)
    ours = make_trainer(tmp_path, SPARSE, eval_dataset=data)
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    ours.train()
    report = ours.lemo.passes.tally.counts
    before = dict(report)
    ours.evaluate()
    assert ours.lemo.passes.tally.counts == before


@pytest.mark.oldest
def test_logs_say_what_was_kept(tmp_path, capsys):
    config = replace(SPARSE, dense_first_layers=2, mlp_retention=0.25)
    trainer = make_trainer(tmp_path, config)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert log["lemo/attention_retention"] == pytest.approx((2 + 2 * 0.5) / 4)
        assert log["lemo/mlp_retention"] == pytest.approx((2 + 2 * 0.25) / 4)
        assert log["lemo/kept_tokens_per_second"] > 0
    out = capsys.readouterr().out
    assert "LeMo: 2 of 4 layers (2 to 3) are sparse, attention retention 0.5" in out
    assert "MLP retention 0.25" in out and "The other layers, evaluation and gen" in out
    assert (
        ". Evaluation and generation stay dense." in make_trainer(tmp_path, SPARSE).lemo.describe()
    )


@pytest.mark.parametrize("by_callback", [False, True])
@pytest.mark.parametrize("level", ["error", "critical", "warning", "passive"])
def test_errors_alone_are_said_where_that_is_asked_for(
    tmp_path, capsys, caplog, level, by_callback
):
    logger = logging.getLogger("lemo_hf")
    verbosity = transformers.logging.get_verbosity()
    arguments = {"log_level": level, "data": dataset(answers=50)}
    try:
        if by_callback:
            arguments["callbacks"] = [LeMoCallback(SPARSE)]
            make_trainer(tmp_path, None, cls=Trainer, **arguments).train()
        else:
            make_trainer(tmp_path, SPARSE, **arguments).train()
    finally:
        transformers.logging.set_verbosity(verbosity)
        logger.setLevel(logging.NOTSET)  # and what children remembered of it
    quiet = level in ("error", "critical")
    assert ("LeMo: 4 of 4 layers" in capsys.readouterr().out) == (not quiet)
    assert ("more than retention 0.5 allows" in caplog.text) == (not quiet)


def test_a_quiet_library_still_says_what_trains(tmp_path, capsys):
    """As the demo and many scripts quiet it, without a log_level."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        make_trainer(tmp_path, SPARSE, max_steps=1).train()
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert "LeMo: 4 of 4 layers" in capsys.readouterr().out


def test_peak_memory_is_logged_on_cuda_alone(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE)
    trainer.train()
    logged = "lemo/peak_memory_gib" in trainer.state.log_history[0]
    assert logged == torch.cuda.is_available()


@pytest.mark.oldest
def test_callbacks_collators_and_packing(tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            Count.steps += 1

    data = [{"input_ids": row["input_ids"][: 20 + i % 30]} for i, row in enumerate(dataset())]
    arguments = {"data": data, "callbacks": [Count], "per_device_train_batch_size": 4}
    arguments["data_collator"] = DataCollatorWithFlattening()
    packed = make_trainer(tmp_path, SPARSE, **arguments)
    assert all(0 < loss < 20 for loss in losses(packed)) and Count.steps == 4
    assert packed.state.log_history[0]["lemo/attention_retention"] < 0.7
    full = losses(make_trainer(tmp_path, FULL, **arguments))
    plain = losses(make_trainer(tmp_path, None, cls=Trainer, **arguments))
    assert full == pytest.approx(plain, rel=1e-5)


@pytest.mark.oldest
def test_a_users_own_loss_is_respected(tmp_path):
    """It gets logits and labels as from Trainer; eliminated tokens' labels are struck."""
    calls = []

    def own_loss(outputs, labels, num_items_in_batch=None):
        calls.append((labels.clone(), float(num_items_in_batch)))
        nll = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return nll / num_items_in_batch

    full = losses(make_trainer(tmp_path, FULL, compute_loss_func=own_loss))
    plain = losses(make_trainer(tmp_path, None, cls=Trainer, compute_loss_func=own_loss))
    assert full == pytest.approx(plain, rel=1e-5)
    calls.clear()
    everything = replace(SPARSE, supervise="all")
    make_trainer(tmp_path, everything, compute_loss_func=own_loss).train()
    assert all((labels != -100).all() and items == 126 for labels, items in calls)
    calls.clear()
    kept = losses(make_trainer(tmp_path, SPARSE, compute_loss_func=own_loss))
    for labels, items in calls:
        # Half of 64 tokens are kept, the last among them, which has nothing to predict.
        assert (labels[:, 1:] != -100).sum() == 2 * 31 and items == pytest.approx(2 * 31)
    assert kept == pytest.approx(losses(make_trainer(tmp_path, SPARSE)), rel=1e-5)


@pytest.mark.oldest
def test_label_smoothing_is_trainers(tmp_path):
    full = losses(make_trainer(tmp_path, FULL, label_smoothing_factor=0.1))
    plain = losses(make_trainer(tmp_path, None, cls=Trainer, label_smoothing_factor=0.1))
    assert full == pytest.approx(plain, rel=1e-5)


@pytest.mark.oldest
def test_a_forward_on_the_instance_keeps_its_loss(tmp_path):
    """As Liger and TRL do: the loss is theirs, and gets the labels of kept tokens."""
    model = make_model("llama")
    stock, seen = model.forward, []

    def forward(input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        logits = stock(input_ids=input_ids, **kwargs).logits
        seen.append((labels, num_items_in_batch))
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return {"loss": nll / num_items_in_batch}

    model.forward = forward
    theirs = losses(make_trainer(tmp_path, SPARSE, model=model))
    assert all((labels[:, 1:] != -100).sum() == 2 * 31 for labels, _ in seen)
    ours = losses(make_trainer(tmp_path, SPARSE, model=make_model("llama")))
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_answers_beyond_the_budget_are_logged_once(tmp_path, caplog):
    trainer = make_trainer(tmp_path, SPARSE, data=dataset(answers=50))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("more than retention 0.5 allows (4): all blocks with labels") == 1
    assert trainer.state.log_history[0]["lemo/attention_retention"] > 0.8


def test_completion_only_trains_every_answer(tmp_path, monkeypatch):
    """All label blocks are kept, so the loss covers every answer token."""
    monkeypatch.setattr(row_counts, "LABELS", 1)  # the head takes the labelled rows and no more
    data = dataset(answers=20)
    kept = losses(make_trainer(tmp_path, SPARSE, data=data))
    everything = replace(SPARSE, supervise="all")
    assert kept == losses(make_trainer(tmp_path, everything, data=data))


@pytest.mark.parametrize(
    "lora", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}]
)
@pytest.mark.parametrize("tied", [False, True])
def test_any_head_trains(tmp_path, lora, tied):
    """Frozen, wrapped by LoRA or trained in full, tied to the embeddings or not."""

    def model():
        return with_lora(make_model("llama", tie_word_embeddings=tied), **lora)

    full = make_trainer(tmp_path, FULL, model=model())
    plain = make_trainer(tmp_path, None, cls=Trainer, model=model())
    assert losses(full) == pytest.approx(losses(plain), rel=1e-5)
    assert_same_weights(full, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.oldest
def test_model_init(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE, model_init=lambda: make_model("llama"))
    direct = make_trainer(tmp_path, SPARSE, model=make_model("llama"))
    assert losses(trainer) == losses(direct)


@pytest.mark.oldest
def test_pushes_carry_the_config(tmp_path, monkeypatch):
    pushed = []

    class Job:
        def done(self):
            return True

    def upload_folder(*_, folder_path, **kwargs):
        with open(f"{folder_path}/lemo_config.json", encoding="utf-8") as file:
            pushed.append((kwargs["commit_message"], json.load(file)["block_size"]))
        return Job()

    trainer = make_trainer(tmp_path, SPARSE, save_strategy="steps", save_steps=2)
    trainer.args.push_to_hub = True
    trainer.hub_model_id, trainer.push_in_progress = "me/model", None
    module = __import__("transformers.trainer", fromlist=["trainer"])
    if hasattr(module, "hf_api"):
        api = type("Api", (), {"upload_folder": staticmethod(upload_folder)})
        monkeypatch.setattr(module, "hf_api", lambda: api)
    else:
        monkeypatch.setattr(module, "upload_folder", upload_folder)
    monkeypatch.setattr(trainer, "init_hf_repo", lambda *_, **__: None)
    trainer.train()
    assert pushed == [(f"Training in progress, step {n}", 8) for n in (2, 4)]
    assert "lemo-hf" in transformers_model(trainer.model).model_tags


@pytest.mark.oldest
@pytest.mark.parametrize("lora", [False, True])
def test_no_logits_are_made_in_mixed_precision(tmp_path, lora):
    """Accelerate then puts a forward on the model, which is still the model's own."""
    model = make_model("llama")
    trainer = make_trainer(
        tmp_path, SPARSE, model=with_lora(model) if lora else model, bf16=True, max_steps=1
    )
    trainer.train()
    with trainer.lemo.training():
        output = trainer.model_wrapped.train()(**batch(tokens=64))
    assert [n for n, x in output.items() if isinstance(x, torch.Tensor)] == ["loss"]
    assert output.logits.shape == (2, 64, 97) and output.logits.dtype == torch.float32  # who asks
    assert isinstance(trainer.model_wrapped.forward, MethodType)


@pytest.mark.oldest
def test_a_forward_on_the_class_keeps_its_loss(tmp_path, monkeypatch):
    """As cut cross-entropy does: no instance is touched."""
    stock, seen = LlamaForCausalLM.forward, []

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        logits = stock(self, input_ids=input_ids, **kwargs).logits
        seen.append((labels[:, 1:] != -100).sum(1).tolist())
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return {"loss": nll / num_items_in_batch}

    expected = losses(make_trainer(tmp_path, SPARSE))
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert losses(make_trainer(tmp_path, SPARSE)) == pytest.approx(expected, rel=1e-5)
    assert {tuple(counts) for counts in seen} == {(31, 31)}  # half of 64; the last predicts nothing
