"""A pass that breaks off leaves nothing behind: not by Ctrl-C, nor out of memory."""

import copy
from dataclasses import replace

import pytest
import torch
from support.eager_graphs import use_eager_graphs
from support.models import batch, loss_and_gradients, make_model, same_step
from support.trainers import SPARSE, assert_same_weights, losses, make_trainer

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.memory.out_of_memory import CHECKPOINTING, what_helps

CONFIG = LeMoConfig(retention=0.5, block_size=8, policy="random", segment_size=40)
# Where a pass breaks off, by the module that is about to be called.
PLACES = {
    "first layer": "model.layers.0.input_layernorm",
    "attention": "model.layers.2.self_attn.q_proj",
    "last MLP": "model.layers.3.mlp.down_proj",
    "loss": "lm_head",
}


class Breaks:
    """Ends the next pass at a module, or in the loss, which reads what the module would have."""

    def __init__(self, model, place, error):
        self.error, self.backward = error, place.startswith("backward of ")
        module = model.get_submodule(PLACES[place.removeprefix("backward of ")])
        self.hook = module.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        if self.backward:
            output.register_hook(self.end)
        else:
            self.end()

    def end(self, *_):
        raise self.error


def break_off(model, place, error, **inputs):
    hook = Breaks(model, place, error).hook
    with pytest.raises(type(error)):
        model(**inputs).loss.backward()
    hook.remove()
    model.zero_grad()
    # PyTorch 2.11 goes on recording for a checkpoint as long as someone holds the frame inside it.
    error.__traceback__ = None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no room")])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("place", [*PLACES, "backward of attention", "backward of loss"])
def test_what_comes_next_is_exact(place, checkpointed, error):
    """Evaluation, the decoder alone, the next training pass, and the model without LeMo."""
    model = make_model("llama")
    plain = copy.deepcopy(model)
    other = batch(rows=3, tokens=45)  # another shape: what is left of the first would not fit
    if checkpointed:
        model.gradient_checkpointing_enable()
    same_step(apply_lemo(model, CONFIG))
    sparse = loss_and_gradients(model, **other)
    break_off(model, place, error, **batch())
    assert model._lemo.passes.current is None
    with torch.no_grad():
        expected = plain.eval()(**other)
        found = model.eval()(**other)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.logits, expected.logits)
        hidden = model.model(other["input_ids"]).last_hidden_state
        assert torch.equal(hidden, plain.model(other["input_ids"]).last_hidden_state)
    model.train()
    loss, gradients = loss_and_gradients(model, **other)
    assert loss == sparse[0]
    for name, gradient in gradients.items():
        assert torch.equal(gradient, sparse[1][name]), name
    break_off(model, place, error, **batch())
    remove_lemo(model)
    loss, gradients = loss_and_gradients(model, **other)
    expected = loss_and_gradients(plain.train(), **other)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name])


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("place", ["attention", "backward of attention"])
def test_a_trainer_names_the_knob_and_goes_on(tmp_path, place):
    """The step that ran out of memory is as if it had never been."""
    trainer = make_trainer(tmp_path, SPARSE, model=make_model("llama"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    hook = Breaks(trainer.model, place, out_of_memory()).hook
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.train()
    hook.remove()
    said, *lines = str(raised.value).splitlines()
    assert said == "CUDA out of memory. Tried to allocate 2.00 GiB."
    (line,) = lines
    for knob in (f"{CHECKPOINTING}=True", "offload_gib=...", "retention below 0.5"):
        assert knob in line
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    again = losses(trainer)
    fresh = make_trainer(tmp_path, SPARSE, model=make_model("llama"))
    assert again == losses(fresh)
    assert_same_weights(trainer, fresh, rtol=0, atol=0)


def test_accelerate_still_finds_a_batch_size(tmp_path):
    """`auto_find_batch_size` halves a batch that does not fit, and starts over."""
    settings = {"logging_steps": 1, "data": None, "max_steps": 3}

    def too_much(module, args):
        if args[0].shape[0] * args[0].shape[1] > 32:  # a row of 64 tokens, half of them kept
            raise out_of_memory()

    trainer = make_trainer(
        tmp_path, SPARSE, auto_find_batch_size=True, per_device_train_batch_size=4, **settings
    )
    layer = trainer.model.get_base_model().model.layers[1]
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: too_much(module, (kwargs["hidden_states"],)), with_kwargs=True
    )
    found = losses(trainer)
    expected = make_trainer(tmp_path, SPARSE, per_device_train_batch_size=1, **settings)
    assert found[-3:] == losses(expected)
    assert_same_weights(trainer, expected, rtol=0, atol=0)


def test_a_loop_of_ones_own_is_told_too():
    model = make_model("llama")
    apply_lemo(model, replace(CONFIG, offload_gib=2.0))
    model.gradient_checkpointing_enable()
    hook = Breaks(model, "attention", out_of_memory()).hook
    with pytest.raises(torch.OutOfMemoryError, match="in this order: more than offload_gib=2; ret"):
        model(**batch())
    hook.remove()


def test_a_recording_that_runs_out_of_memory_says_so(monkeypatch):
    """And not that this model cannot become a graph."""
    use_eager_graphs(monkeypatch)
    model = make_model("llama", "sdpa")
    same_step(apply_lemo(model, replace(CONFIG, cuda_graphs=True)))
    expected = loss_and_gradients(model, **batch())
    hook = Breaks(model, "attention", out_of_memory()).hook
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory.*\n.*cuda_graphs=False"):
        model(**batch())
    hook.remove()
    for _ in range(2):
        found = loss_and_gradients(model, **batch())
        assert found[0] == expected[0]
        for name, gradient in found[1].items():
            torch.testing.assert_close(gradient, expected[1][name])


def test_what_helps_is_what_is_left_to_turn():
    first = "in this order: "
    assert first + "LeMoConfig(finish_retention=...) below 1" in what_helps(CONFIG, True, True)
    lowest = replace(CONFIG, dense_finish=0.5, finish_retention=CONFIG.retention)
    for config, finish in ((CONFIG, False), (lowest, True)):
        assert first + "LeMoConfig(offload_gib=...)" in what_helps(config, True, finish)
    full = replace(CONFIG, recompute="full")
    assert first + "LeMoConfig(offload_gib=...)" in what_helps(full, False, False)
    limits = LeMoConfig(threshold=0.5)
    assert "a higher threshold" in what_helps(limits, False, False)
    lists = LeMoConfig(retention=(1, 0.5), agree_across_layers=False)
    assert "lower retentions" in what_helps(lists, False, False)


def test_labels_that_were_promised_to_no_pass(tmp_path):
    """Ctrl-C between the two: the labels are not the next pass's, which has others."""

    def own_loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )

    trainer = make_trainer(tmp_path, SPARSE, model=make_model("llama"), compute_loss_func=own_loss)

    def interrupted(*_):
        raise KeyboardInterrupt

    # Registered first, it comes before LeMo's.
    hook = trainer.model.register_forward_pre_hook(interrupted, prepend=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.compute_loss(trainer.model, batch(tokens=64))
    hook.remove()
    assert not trainer.lemo.passes.announced.any()
