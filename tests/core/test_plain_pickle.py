"""`pickle` and `torch.save(model)` write the plain model. A deep copy keeps LeMo."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, with_lora
from support.trainers import SPARSE, losses, make_trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core import layer as layer_module
from lemo_hf.patch import lemo_of, transformers_model

CONFIG = LeMoConfig(retention=0.5, block_size=8, policy="random", recompute="selective")


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def seen(*_):
    """A hook of the user's, which is the model's own."""


@pytest.mark.oldest
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("save", [by_pickle, by_torch])
def test_the_plain_model_is_written(save, lora):
    def make():
        model = make_model("llama")
        model.register_forward_hook(seen)
        return with_lora(model) if lora else model

    plain, model = make(), make()
    model.load_state_dict(plain.state_dict())
    apply_lemo(model, CONFIG)
    written = save(model)
    assert [type(part) for part in written.modules()] == [type(part) for part in plain.modules()]
    for part, other in zip(written.modules(), plain.modules(), strict=True):
        assert vars(part).keys() == vars(other).keys()
    inner, expected = transformers_model(written), transformers_model(plain)
    assert [*inner._forward_hooks.values()] == [*expected._forward_hooks.values()] == [seen]
    assert not inner._forward_pre_hooks and not inner._forward_hooks_always_called
    assert loss_and_gradients(written, **batch())[0] == loss_and_gradients(plain, **batch())[0]
    assert lemo_of(model) is not None and lemo_of(written) is None
    apply_lemo(written, CONFIG)  # and may have LeMo again
    assert loss_and_gradients(written, **batch())[0] == loss_and_gradients(model, **batch())[0]


def test_it_loads_where_lemo_is_not(tmp_path):
    model = make_model("llama")
    apply_lemo(model, CONFIG)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['lemo_hf'] = None\n"  # then importing it is an error
        "import torch; model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(type(model.model.layers[0]).__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "transformers.models.llama.modeling_llama", done.stderr


def test_a_layer_by_itself():
    model = make_model("llama")
    plain = type(model.model.layers[1])
    apply_lemo(model, CONFIG)
    assert type(by_pickle(model.model.layers[1])) is plain


def test_a_deep_copy_keeps_lemo():
    """With passes, counts and hooks of its own."""
    model = make_model("llama")
    lemo = apply_lemo(model, CONFIG)
    twin = copy.deepcopy(model)
    own = lemo_of(twin)
    assert own is not lemo and own.passes is not lemo.passes
    loss, gradients = loss_and_gradients(twin, **batch())
    assert own.report()["attention_retention"] < 0.6 and lemo.report() == {}
    expected = loss_and_gradients(model, **batch())
    assert loss == expected[0]
    assert all(torch.equal(gradients[name], value) for name, value in expected[1].items())
    remove_lemo(model)
    own.passes.resting = True
    assert loss_and_gradients(twin, **batch())[0] == loss_and_gradients(model, **batch())[0]
    assert type(by_pickle(twin)) is type(model)


def test_nothing_is_left_when_it_is_off(tmp_path):
    model = make_model("llama")
    names = [set(vars(part)) for part in model.modules()]
    apply_lemo(model, CONFIG)
    remove_lemo(model)
    assert [set(vars(part)) for part in model.modules()] == names


@pytest.mark.oldest
def test_what_a_trainer_has_trained(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE, model=make_model("llama"))
    losses(trainer)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch()).logits
        assert torch.equal(by_torch(trainer.model)(**batch()).logits, expected)


def test_deep_copies_of_wrappers_are_wrappers():
    """PEFT's and torch.compile's answer for what they lack with what the model has."""
    model = with_lora(make_model("llama"))
    apply_lemo(model, CONFIG)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and lemo_of(twin) is not lemo_of(model)
    twin(**batch()).loss.backward()
    assert lemo_of(twin).report() and not lemo_of(model).report()
    compiled = torch.compile(make_model("llama"), backend="eager")
    apply_lemo(compiled._orig_mod, CONFIG)
    assert type(copy.deepcopy(compiled)) is type(compiled)


def test_deep_copies_of_layers():
    """torch.compile's wrapper around a layer is copied as such; both copies have LeMo."""
    model = make_model("llama")
    apply_lemo(model, CONFIG)
    layer = model.model.layers[1]
    for twin in (copy.deepcopy(layer), copy.deepcopy(model.model).layers[1], copy.copy(layer)):
        assert type(twin) is LlamaDecoderLayer and layer_module._SETUP not in vars(twin)
    memo = {}
    copy.deepcopy(layer, memo)
    parts = [x for x in memo.values() if isinstance(x, torch.nn.Module)]
    assert len(parts) == len(list(layer.modules()))  # no other part of the model
    model.model.layers[1] = torch.compile(layer, backend="eager")
    twin = copy.deepcopy(model)
    for part, other in zip(twin.modules(), model.modules(), strict=True):
        assert type(part) is type(other) and part is not other
    assert type(twin.model.layers[1]) is not type(layer)
    expected = loss_and_gradients(model, **batch())[0]
    assert loss_and_gradients(twin, **batch())[0] == expected
    assert lemo_of(twin).report() == lemo_of(model).report()
    remove_lemo(twin)
    assert type(by_pickle(twin.model.layers[0])) is type(twin.model.layers[0]) is not type(layer)
