"""A real model on real text: the demo's, and its predictor."""

import runpy

import pytest
import torch
from support.models import loss_and_gradients, relative_error, with_lora
from support.paths import DEMO
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from lemo_hf import LeMoConfig, LeMoPredictor, LeMoTrainer, apply_lemo, remove_lemo
from lemo_hf.tune.recall import recall_table

TOKENS = 1024


def load():
    """The demo's model for twice its context: positions scaled, nothing trained yet."""
    config = AutoConfig.from_pretrained(DEMO / "model", use_cache=False)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    config.max_position_embeddings = TOKENS
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", config=config, dtype=torch.float32)


def rows(name, count):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "text" / name).read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"][: TOKENS * count]
    return [
        {"input_ids": ids[i : i + TOKENS], "labels": ids[i : i + TOKENS]}
        for i in range(0, len(ids), TOKENS)
    ]


def test_retention_1_on_real_text_is_the_stock_model():
    torch.manual_seed(0)
    model = with_lora(load())
    inputs = {k: torch.tensor([v]) for k, v in rows("train-alice-adams.txt", 1)[0].items()}
    loss, gradients = loss_and_gradients(model, **inputs)
    apply_lemo(model, LeMoConfig(retention=1.0, segment_size=300))
    sparse_loss, sparse_gradients = loss_and_gradients(model, **inputs)
    assert sparse_loss == pytest.approx(loss, rel=1e-6)
    # 1,024 tokens add up in another order than 70 do in the family tests, hence 1e-5.
    assert all(relative_error(sparse_gradients[n], gradients[n]) < 1e-5 for n in gradients)
    remove_lemo(model)


def test_sparse_training_extends_the_context_of_the_dense_model(tmp_path):
    trainer = LeMoTrainer(
        model=with_lora(load(), r=16, lora_alpha=32, init_lora_weights=True),
        args=TrainingArguments(
            output_dir=tmp_path,
            max_steps=12,
            per_device_train_batch_size=2,
            learning_rate=2e-3,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows("train-alice-adams.txt", 24),
        eval_dataset=rows("heldout-oh-money-money.txt", 4),
        lemo_config=LeMoConfig(retention=0.5, dense_first_layers=2),
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()  # as PEFT begins: the adapter does nothing yet
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1


@pytest.mark.soak
def test_the_demo_predictor_beats_what_needs_no_predictor():
    """On held-out rows: the predictor that the demo uses against rankings without one."""
    setting = runpy.run_path(DEMO / "setting.py")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    rows = setting["rows"](tokenizer, "heldout-*.txt")
    model = setting["load_model"]()
    predictor = LeMoPredictor.from_pretrained(DEMO / "predictor")
    table = recall_table(
        model,
        predictor,
        {"book": [row["input_ids"] for row in rows]},
        (0.3,),
        ("pooled", "recent", "random"),
    )
    found = {row["policy"]: row["recall"] for row in table}
    assert found["predictor"] > found.pop("untrained")  # it learned something
    assert found.pop("predictor") > max(found.values()) + 0.02
