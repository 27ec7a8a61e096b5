"""A model without its adapters by their switches: as by PEFT, with less to do."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import batch, make_model

from lemo_hf.integrations.adapters_off import quickly_disabled, switches_of


def adapted(**options):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return get_peft_model(make_model("llama"), LoraConfig(**settings, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}],
)
def test_it_is_what_peft_does(options):
    model = adapted(**options)
    if "modules_to_save" in options:  # which begins as a copy
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    ids = batch()["input_ids"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        whole = model(ids).logits
        with model.disable_adapter():
            expected = model(ids).logits
        assert (whole - expected).abs().max() > 0.01
        with quickly_disabled(model, switches_of(model)):
            with model.disable_adapter():
                assert torch.equal(model(ids).logits, expected)
                assert model._adapters_disabled
            assert torch.equal(model(ids).logits, whole)
            assert not model._adapters_disabled
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "disable_adapter" not in vars(model)


def test_what_breaks_off_leaves_them_on():
    model = adapted()
    switches = switches_of(model)
    assert len(switches) == 2 * model.config.num_hidden_layers
    with (
        pytest.raises(KeyboardInterrupt),
        quickly_disabled(model, switches),
        model.disable_adapter(),
    ):
        assert all(switch.disable_adapters for switch in switches)
        raise KeyboardInterrupt
    assert not any(switch.disable_adapters for switch in switches)
    assert "disable_adapter" not in vars(model)


def test_those_that_were_off_stay_off():
    model = adapted()
    first, *others = switches = switches_of(model)
    first.enable_adapters(False)
    with quickly_disabled(model, switches), model.disable_adapter():
        pass
    assert first.disable_adapters and not any(switch.disable_adapters for switch in others)


def test_a_model_without_adapters_stays_as_it_is():
    model = make_model("llama")
    with quickly_disabled(model, switches_of(model)):
        assert "disable_adapter" not in vars(model)
