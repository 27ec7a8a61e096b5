"""The experts' auxiliary loss: transformers' own function of kept tokens' router logits."""

import sys

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, relative_error
from transformers import TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo, remove_lemo
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.sparse_pass import SparsePass

BALANCED = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "minimax_m2",
    "ernie4_5_moe",
    "granitemoe",
    "phimoe",
    "gpt_oss",
)
COEFFICIENT = 3.0  # so that it cannot hide behind the loss of the tokens


def experts(family, **settings):
    settings = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, **settings}
    return make_model(family, num_hidden_layers=2, **settings)


def padded():
    """Rows of 70 and 45 tokens, padded on the right as collators do."""
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, 45:] = 0
    inputs = batch()
    return {
        **inputs,
        "attention_mask": mask,
        "labels": inputs["labels"].masked_fill(mask == 0, -100),
    }


@pytest.mark.parametrize("family", BALANCED)
def test_retention_1_is_the_stock_model(family):
    """Loss, gradients, and the auxiliary loss by itself; padding is not counted."""
    model = experts(family)
    if "router_logits" not in (model.model._can_record_outputs or {}):
        pytest.skip(f"this version of transformers collects no router logits of {family}")
    inputs = padded()
    stock = model(**inputs).aux_loss.item()
    loss, expected = loss_and_gradients(model, **inputs)
    for recompute in ("none", "mlp", "full"):
        apply_lemo(model, LeMoConfig(retention=1.0, block_size=8, recompute=recompute))
        assert model(**inputs).aux_loss.item() == pytest.approx(stock, rel=1e-6)
        found, gradients = loss_and_gradients(model, **inputs)
        remove_lemo(model)
        assert found == pytest.approx(loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            if gradient.norm() > 1e-6:
                assert relative_error(gradients[name], gradient) < 2e-5, (recompute, name)


@pytest.mark.parametrize("recompute", ["none", "mlp", "selective", "full"])
@pytest.mark.parametrize("own", [None, 0.6])
def test_it_is_the_stock_function_of_kept_tokens(own, recompute, monkeypatch):
    """Its value, and what it adds to gradients: those of transformers' function of the logits."""
    model = experts("mixtral")
    config = LeMoConfig(
        retention=0.5,
        mlp_retention=own,
        block_size=8,
        policy="random",
        agree_across_layers=False,
        recompute=recompute,
    )
    counted, logits = [], []
    monkeypatch.setattr(
        SparsePass,
        "counted",
        lambda sparse_pass, kept, f=SparsePass.counted: (
            counted.append(f(sparse_pass, kept)) or counted[-1]
        ),
    )
    inputs = padded()
    model.router_aux_loss_coef = 0.0
    apply_lemo(model, config)
    plain, without = loss_and_gradients(model, **inputs)
    remove_lemo(model)
    model.router_aux_loss_coef = COEFFICIENT
    lemo = apply_lemo(model, config)
    counted.clear()
    loss, gradients = loss_and_gradients(model, **inputs)
    kept = [c.clone() for c in counted]
    share = lemo.report()["kept_tokens"] / inputs["attention_mask"].sum()
    assert share < 0.9 and len(kept) == 2
    # Once more with nothing computed again, for the logits and a graph of transformers' own.
    remove_lemo(model)
    apply_lemo(model, LeMoConfig(**{**vars(config), "recompute": "none"}))
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *a: logits.append(a[2][0]))
    model.config.output_router_logits = False
    model.zero_grad()
    model(**inputs)
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    rows = tuple(x[c] for x, c in zip(logits, kept, strict=True))
    aux = function(rows, 4, 2)
    assert loss - plain == pytest.approx(COEFFICIENT * aux.item(), rel=1e-5)
    (COEFFICIENT * aux).backward()
    for name, parameter in model.named_parameters():
        added = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if added.norm() > 1e-6:
            assert relative_error(gradients[name], without[name] + added) < 2e-5, name
    assert model.model.layers[0].mlp.gate.weight.grad.norm() > 1e-3


def test_a_factor_of_the_loss_is_one_of_the_auxiliary_loss():
    model = experts("olmoe")
    apply_lemo(model, LeMoConfig(retention=0.5, block_size=8))
    gradients = []
    for factor in (1.0, 0.25):
        model.zero_grad()
        (factor * model(**batch()).loss).backward()
        gradients.append(model.model.layers[1].mlp.gate.weight.grad.clone())
    assert relative_error(gradients[1], 0.25 * gradients[0]) < 1e-5


def test_lemo_trainer_logs_what_trainer_logs(tmp_path):
    """Over accumulated batches, with checkpointing; half of the tokens give another loss."""
    text = batch(8, 32)["input_ids"]
    rows = [{"input_ids": ids, "labels": ids} for ids in text]
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none"}
    found = []
    for retention in (None, 1.0, 0.5):
        arguments = TrainingArguments(
            str(tmp_path), gradient_checkpointing=retention is not None, **settings
        )
        lemo = retention and LeMoConfig(retention=retention, block_size=8, policy="random")
        trainer = LeMoTrainer(
            experts("mixtral"), arguments, train_dataset=rows, lemo_config=lemo or None
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        found.append([(log["loss"], log["grad_norm"]) for log in logs])
    assert len(found[0]) == 2
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found[2][0][0] != pytest.approx(found[0][0][0], rel=1e-3)


def test_what_cannot_have_it():
    config = LeMoConfig(block_size=8)
    model = make_model("glm4_moe", num_hidden_layers=2)
    apply_lemo(model, config)
    with pytest.raises(ValueError, match="Glm4MoeForCausalLM has no auxiliary loss"):
        model(**batch(), output_router_logits=True)
    model = experts("mixtral")
    lemo = apply_lemo(model, config)
    lemo.begin_step(0)
    with pytest.raises(ValueError, match="needs the model's own loss.*output_router_logits=False"):
        model(input_ids=batch()["input_ids"])


def test_every_family_of_experts_names_its_router():
    for name, row in FAMILIES.items():
        assert (row.intermediate is None) == (row.router is not None), name
