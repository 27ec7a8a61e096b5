"""Layers that are wrapped or replaced while LeMo is on: they train sparse or are named, and
`remove_lemo` gives all of them back."""

import copy
from types import MethodType

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.layer import SparseLayer
from lemo_hf.patch import lemo_of

pytestmark = pytest.mark.oldest

CONFIG = LeMoConfig(retention=0.5, block_size=8, policy="recent")


class Around(nn.Module):
    """Calls the layer that it holds, and has its attributes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class Beside(Around):
    """Reads what the layer reads, before it or after it."""

    def __init__(self, layer, before):
        super().__init__(layer)
        self.before = before

    def forward(self, x, *args, **kwargs):
        seen = x.clone() if self.before else x
        y = self.layer(x, *args, **kwargs)
        return seen + y


class Past(Around):
    """Calls parts of the layer alone."""

    def forward(self, x, *args, **kwargs):
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))


def put(model, make, index=1):
    layers = model.get_submodule("model.layers")
    layers[index] = make(layers[index])


def left(model):
    return [part for part in model.modules() if isinstance(part, SparseLayer)]


@pytest.mark.parametrize("make", [Around, lambda layer: torch.compile(layer, backend="eager")])
@pytest.mark.parametrize("lora", [False, True])
def test_a_wrapper_that_calls_the_layer_changes_nothing(make, lora):
    model = make_model("llama")
    whole = with_lora(model) if lora else model
    stock = type(model.model.layers[1])
    plain, _ = loss_and_gradients(model, **batch())
    apply_lemo(whole, CONFIG)
    loss, gradients = loss_and_gradients(whole, **batch())
    put(model, make)
    found, others = loss_and_gradients(whole, **batch())
    assert found == loss != plain
    for (name, x), y in zip(gradients.items(), others.values(), strict=True):
        assert torch.equal(x, y), name
    remove_lemo(whole)
    assert not left(model) and sum(type(part) is stock for part in model.modules()) == 4
    assert loss_and_gradients(whole, **batch())[0] == plain


def test_a_wrapper_may_read_what_the_layer_reads():
    """Though the layer updates its input in place."""
    results = []
    for before in (True, False):
        model = make_model("llama")
        apply_lemo(model, CONFIG)
        put(model, lambda layer, before=before: Beside(layer, before))
        results.append(loss_and_gradients(model, **batch()))
    (loss, gradients), (found, others) = results
    assert found == loss
    assert all(relative_error(others[name], gradients[name]) < 1e-6 for name in gradients)


def fresh(layer):
    return make_model("llama").model.layers[1]


def with_a_forward_of_its_own(layer):
    layer.forward = MethodType(fresh(layer).forward.__func__, layer)
    return layer


@pytest.mark.parametrize("make", [Past, fresh, copy.deepcopy, with_a_forward_of_its_own])
def test_a_layer_that_would_not_train_sparse_is_named(make):
    model = make_model("llama")
    plain = loss_and_gradients(model, **batch())[0]
    apply_lemo(model, CONFIG)
    layer = model.model.layers[1]
    put(model, make)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layer 1 of this .* remove_lemo.*then apply_lemo"):
            model(**batch())
    assert lemo_of(model).passes.current is None and not lemo_of(model).report()
    assert model.eval()(**batch()).loss.isfinite()  # as the user has made it
    remove_lemo(model.train())
    assert not left(model) and not left(layer)
    model.model.layers[1] = layer
    vars(layer).pop("forward", None)
    assert loss_and_gradients(model, **batch())[0] == plain
    apply_lemo(model, CONFIG)
    assert loss_and_gradients(model, **batch())[0] != plain


@pytest.mark.parametrize(("count", "index"), [(3, 3), (5, 4)])
def test_layers_that_were_taken_away_or_added_are_named(count, index):
    model = make_model("llama")
    apply_lemo(model, CONFIG)
    layers = [*model.model.layers, fresh(None)]
    model.model.layers = nn.ModuleList(layers[:count])
    with pytest.raises(RuntimeError, match=f"layer {index} of this training pass is not"):
        model(**batch())
    remove_lemo(model)
    assert not any(map(left, layers))


def test_a_wrapper_around_all_layers():
    model = make_model("llama")
    apply_lemo(model, CONFIG)
    loss = loss_and_gradients(model, **batch())[0]
    inner = model.model
    model.model = Around(inner)
    assert loss_and_gradients(model, **batch())[0] == loss
    model.model = nn.Sequential(inner)
    with pytest.raises(RuntimeError, match="layers are not at 'model.layers' any more"):
        model(**batch())
    remove_lemo(model)
    assert not left(model)


def test_pytorchs_checkpointing_is_refused():
    """It would run the layer again outside its pass."""
    model = make_model("llama")
    apply_lemo(model, CONFIG)
    put(model, checkpoint_wrapper)
    with pytest.raises(RuntimeError, match="layer 1 is inside PyTorch's CheckpointWrapper"):
        model(**batch())
    remove_lemo(model)
    assert not left(model)


@pytest.mark.parametrize("calls_super", [False, True])
def test_a_class_that_was_derived_since(calls_super):
    """It stays on the layer. With `super()` it must stay what it is, and LeMo does nothing."""
    model = make_model("llama")
    plain = loss_and_gradients(model, **batch())[0]
    apply_lemo(model, CONFIG)
    loss = loss_and_gradients(model, **batch())[0]
    layer = model.model.layers[1]
    if calls_super:

        class Own(type(layer)):
            def extra_repr(self):
                return f"own {super().extra_repr()}"
    else:

        class Own(type(layer)):
            def extra_repr(self):
                return "own "

    layer.__class__ = Own
    assert loss_and_gradients(model, **batch())[0] == loss
    remove_lemo(model)
    assert type(layer).__name__ == "Own" and layer.extra_repr() == "own "
    assert isinstance(layer, SparseLayer) == calls_super
    assert loss_and_gradients(model, **batch())[0] == plain
    model.gradient_checkpointing_enable()
    assert loss_and_gradients(model, **batch())[0] == plain


def test_a_method_that_somebody_has_kept_is_the_stock_layers():
    """Whoever wraps the forward of a layer while LeMo is on calls it when LeMo is off, too."""
    model = make_model("llama")
    plain = loss_and_gradients(model, **batch())[0]
    apply_lemo(model, CONFIG)
    loss = loss_and_gradients(model, **batch())[0]
    layer = model.model.layers[1]
    kept = layer.forward
    layer.forward = lambda *args, **kwargs: kept(*args, **kwargs)
    assert loss_and_gradients(model, **batch())[0] == loss
    remove_lemo(model)
    assert loss_and_gradients(model, **batch())[0] == plain
