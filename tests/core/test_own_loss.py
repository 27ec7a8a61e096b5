"""Whose loss a pass takes, its logits for who asks, and passes without labels."""

import gc
import logging
import weakref
from dataclasses import replace
from functools import partial, wraps

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from support.trainers import FULL, SPARSE, assert_same_weights, dataset, losses, make_trainer
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo
from lemo_hf.patch import transformers_model

pytestmark = pytest.mark.oldest


class Doubled(LlamaForCausalLM):
    """A loss of the class's own."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = super().forward(input_ids=input_ids, **kwargs).logits
        loss = 2 * cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Tripled(LlamaForCausalLM):
    """The loss of its parent, and more."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = 3 * output.loss
        return output


class Shifted(LlamaModel):
    """Another base model."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 0.5 + 0.1
        return output


def smoothed(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    return cross_entropy(logits.view(-1, vocab_size), targets, label_smoothing=0.3)


def of_another_class(kind, model):
    model.__class__ = kind


def with_another_base(model):
    model.model.__class__ = Shifted


def with_a_loss_function(model):
    model.loss_function = smoothed


def with_a_loss_type(model):
    model.loss_type = "ForMaskedLM"


def with_a_hook_on_the_base_model(model):
    def halve(_, args, output):
        output.last_hidden_state = output.last_hidden_state * 0.5
        return output

    model.model.register_forward_hook(halve)


def with_a_hook_on_the_norm(model):
    model.model.norm.register_forward_hook(lambda _, args, output: output * 0.5)


def with_a_hook_on_the_head(model):
    model.lm_head.register_forward_hook(lambda _, args, output: output * 0.5)


def with_a_hook_before_the_head(model):
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))


def with_hooks_around_the_norm_and_the_head(model):
    with_a_hook_on_the_norm(model)
    with_a_hook_before_the_head(model)


def with_a_hook_on_the_model(model):
    def double(_, args, output):
        output.loss = 2 * output.loss
        return output

    model.register_forward_hook(double)


CHANGES = [
    partial(of_another_class, Doubled),
    partial(of_another_class, Tripled),
    with_another_base,
    with_a_loss_function,
    with_a_loss_type,
    with_a_hook_on_the_base_model,
    with_a_hook_on_the_norm,
    with_a_hook_on_the_head,
    with_a_hook_before_the_head,
    with_hooks_around_the_norm_and_the_head,
    with_a_hook_on_the_model,
]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_loss_that_is_not_plain_stays_what_it_is(change, before):
    """Whether LeMo comes before or after it."""
    stock, model, inputs = make_model("llama"), make_model("llama"), batch()
    plain = stock(**inputs).loss.item()
    change(stock)
    expected, gradients = loss_and_gradients(stock, **inputs)
    assert abs(expected - plain) > 1e-2  # it is another loss
    if before:
        change(model)
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8, segment_size=40))
    if not before:
        change(model)
    ours, found = loss_and_gradients(model, **inputs)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert all(relative_error(found[name], x) < 1e-4 for name, x in gradients.items())


@pytest.mark.parametrize("ignored", [-1, 5])
def test_an_ignore_index_stays_what_it_is(ignored):
    model, inputs = make_model("llama"), batch()
    inputs["labels"][:, 20:30] = ignored
    expected, gradients = loss_and_gradients(model, **inputs, ignore_index=ignored)
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8))
    ours, found = loss_and_gradients(model, **inputs, ignore_index=ignored)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert all(relative_error(found[name], x) < 1e-4 for name, x in gradients.items())


def test_sparse_passes_strike_by_the_ignore_index():
    """A set that leaves tokens out gives the same loss under either number."""
    model, inputs = make_model("llama"), batch()
    inputs["labels"][:, 20:30] = -100
    apply_lemo(model, LeMoConfig(retention=0.5, block_size=8, policy="random"))
    expected = model(**inputs).loss.item()
    inputs["labels"][:, 20:30] = -1
    assert model(**inputs, ignore_index=-1).loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_patch_that_takes_the_name_of_what_it_wraps_is_noticed(monkeypatch):
    stock = LlamaForCausalLM.forward

    @wraps(stock)
    def forward(self, *args, **kwargs):
        output = stock(self, *args, **kwargs)
        output.loss = 5 * output.loss
        return output

    model = make_model("llama")
    expected = 5 * model(**batch()).loss.item()
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8))
    assert model(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)


# A `compute_loss` of the user's.


def nll(logits, labels, **options):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


class Pops:
    """As the documentation of transformers shows it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nll(outputs.logits, labels, reduction="sum") / num_items_in_batch
        self.seen = labels, num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class Reads:
    """The model is given its labels, whose loss is not used."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = nll(outputs.get("logits"), inputs["labels"], reduction="sum") / num_items_in_batch
        self.seen = inputs["labels"], num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class Adds:
    """Trainer's loss, and a term of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen = inputs["labels"], num_items_in_batch
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + nll(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def kind_of(overrides, base):
    return type(f"{overrides.__name__}{base.__name__}", (overrides, base), {})


def trainer_of(tmp_path, overrides, config, **options):
    base = Trainer if config is None else LeMoTrainer
    trainer = make_trainer(tmp_path, config, cls=base, **options)
    trainer.__class__ = kind_of(overrides, base)
    return trainer


@pytest.mark.parametrize("overrides", [Pops, Reads, Adds])
def test_retention_1_trains_as_trainer_does_with_a_loss_of_the_users(tmp_path, overrides):
    plain = trainer_of(tmp_path, overrides, None)
    ours = trainer_of(tmp_path, overrides, FULL)
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5)
    assert_same_weights(ours, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("overrides", [Pops, Reads])
def test_a_loss_of_the_users_asks_kept_tokens(tmp_path, overrides):
    """And is that of a LeMoTrainer that makes the loss itself."""
    trainer = trainer_of(tmp_path, overrides, SPARSE)
    assert losses(trainer) == pytest.approx(losses(make_trainer(tmp_path, SPARSE)), rel=1e-5)
    labels, items = trainer.seen
    assert (labels[:, 1:] != -100).sum() == items == 2 * 31  # half of 64; the last predicts nothing
    everything = replace(SPARSE, supervise="all")
    trainer = trainer_of(tmp_path, overrides, everything)
    trainer.train()
    labels, items = trainer.seen
    assert (labels[:, 1:] != -100).all() and items == 2 * 63


@pytest.mark.parametrize("overrides", [Pops, Reads, Adds])
def test_answers_are_kept_for_a_loss_of_the_users(tmp_path, overrides):
    data = dataset(answers=20)
    trainer = trainer_of(tmp_path, overrides, SPARSE, data=data)
    trainer.train()
    kept = trainer.lemo.passes.tally.kept_blocks[0, "attention"]
    assert kept[:, 5:].all()  # the answer begins at token 44, and is predicted from 43 on
    labels, items = trainer.seen
    assert (labels[:, 44:] != -100).all() and items == 2 * 20


def test_a_method_of_the_instance_is_a_loss_of_the_users_too(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE)
    trainer.compute_loss = partial(Pops.compute_loss, trainer)
    assert losses(trainer) == pytest.approx(losses(make_trainer(tmp_path, SPARSE)), rel=1e-5)


@pytest.mark.parametrize("pops", [False, True])
def test_two_passes_of_a_step_see_its_labels(tmp_path, pops):
    """As of consistency losses; a pass of another shape goes without."""

    class Twice:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels") if pops else inputs["labels"]
            first, second = model(**inputs), model(**inputs)
            if not pops:
                assert first.loss == second.loss
            model(input_ids=inputs["input_ids"][:, :30])
            return nll((first.logits + second.logits) / 2, labels)

    trainer = trainer_of(tmp_path, Twice, SPARSE, max_steps=1)
    found = losses(trainer)
    assert found == pytest.approx(losses(make_trainer(tmp_path, SPARSE, max_steps=1)), rel=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "opt", "qwen3_moe", "olmo2"])
def test_logits_are_the_models_and_carry_gradients(family, bf16):
    model, inputs = with_lora(make_model(family)), batch()

    def both(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**inputs)
        logits = output["logits"]
        loss = output.loss + nll(logits.sin(), inputs["labels"]) + logits.float().square().mean()
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return logits.detach().float(), found

    logits, gradients = both(model)
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8, segment_size=40))
    ours, found = both(model)
    assert relative_error(ours, logits) < (2e-2 if bf16 else 1e-5)
    if not bf16:
        assert all(relative_error(found[n], g) < 1e-4 for n, g in gradients.items())


def test_logits_are_made_once_when_they_are_asked_for():
    model = make_model("llama")
    apply_lemo(model, LeMoConfig(block_size=8))
    calls = []
    model.lm_head.register_forward_hook(lambda _, args, out: calls.append(out.shape[:-1].numel()))
    output = model(**batch())
    assert output[0] is output.loss and max(calls) < 140
    calls.clear()
    with torch.no_grad():
        assert not output.logits.requires_grad
    assert output.logits is output[1] is output["logits"] is output.get("logits")
    assert output.logits.requires_grad and output[:2] == (output.loss, output.logits)
    assert calls == [140, 140]  # 2 rows of 70 tokens, without gradients and with
    output.loss.backward()
    assert output.logits.shape == (2, 70, 97)


def test_logits_after_the_backward_say_what_to_do():
    model = make_model("llama")
    apply_lemo(model, LeMoConfig(block_size=8))
    output = model(**batch())
    output.loss.backward()
    with pytest.raises(RuntimeError, match="read them before the backward.*without labels"):
        output.logits.sum()
    assert "loss" in repr(output)


@pytest.mark.parametrize("norm", [False, True])
def test_the_stream_goes_with_the_output(norm):
    """Nothing that waits for logits keeps what they would be made of."""
    model = make_model("llama")
    if not norm:
        model.model.norm.register_forward_hook(lambda *_: None)
    apply_lemo(model, LeMoConfig(block_size=8))
    gc.disable()
    try:
        output = model(**batch())
        loss, make = output.loss, weakref.ref(vars(output)["_lemo_logits"])
        hidden = weakref.ref(make()._make.args[0])
        assert hidden() is not None
        del output
        assert make() is None and hidden() is None and loss.requires_grad
        output = model(**batch())
        hidden = weakref.ref(vars(output)["_lemo_logits"]._make.args[0])
        output.loss.backward()
        assert hidden() is None
    finally:
        gc.enable()


def test_a_tuple_has_its_logits():
    model, inputs = make_model("llama"), batch()
    expected = model(**inputs, return_dict=False)
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8))
    found = model(**inputs, return_dict=False)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)


# Passes without labels.


def plain_and_sparse():
    plain, model = make_model("llama"), make_model("llama")
    lemo = apply_lemo(model, LeMoConfig(retention=0.3, block_size=8, policy="random"))
    return plain, model, lemo


@pytest.mark.parametrize("cache", [False, True])
def test_generation_in_training_mode_is_the_plain_models(cache, caplog):
    plain, model, lemo = plain_and_sparse()
    ids = batch()["input_ids"]
    lemo.begin_step(0)  # a sample between two steps
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": cache}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert not lemo.report() and "labels" not in caplog.text


def test_a_pass_without_labels_is_the_plain_models(caplog):
    plain, model, lemo = plain_and_sparse()
    ids = batch()["input_ids"]
    for _ in range(2):
        expected, found = plain(input_ids=ids).logits, model(input_ids=ids).logits
        assert torch.equal(found, expected)
    assert not lemo.report() and caplog.text.count("is the plain model's") == 1
    found.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    model(**batch()).loss.backward()
    assert lemo.report()["attention_retention"] < 0.6


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_plain_pass_may_be_checkpointed(reentrant):
    plain, model, lemo = plain_and_sparse()
    ids = batch()["input_ids"]
    options = {"use_reentrant": reentrant}
    for one in (plain, model):
        one.gradient_checkpointing_enable(options)
        one.enable_input_require_grads()
        one(input_ids=ids, use_cache=False).logits.square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert not lemo.report() and not lemo.passes.plain


def test_a_step_asks_for_a_sparse_pass_without_labels(caplog):
    plain, model, lemo = plain_and_sparse()
    ids = batch()["input_ids"]
    lemo.begin_step(0)
    assert not torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-2)
    assert lemo.report()["attention_retention"] < 0.6
    assert "no labels, so LeMo does not know which blocks hold answers" in caplog.text
    lemo.end_step()
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_after_a_step_of_the_trainer_the_model_is_the_plain_one(tmp_path, caplog):
    trainer = make_trainer(tmp_path, SPARSE, model=make_model("llama"), max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    model = transformers_model(trainer.model)
    assert not model.training or not trainer.lemo.passes.asked
    ids = batch()["input_ids"]
    expected = model.eval()(input_ids=ids).logits
    assert torch.equal(model.train()(input_ids=ids).logits, expected)
