"""Data as users have them: streams, lengths of all kinds, packed documents, batches that shrink."""

import pytest
import torch
from datasets import Dataset
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from support.ragged import Padded, ragged
from support.trainers import FULL, SPARSE, losses, make_trainer
from transformers import DataCollatorWithFlattening, Trainer

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo

pytestmark = pytest.mark.oldest


def stream(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


COLLATORS = {
    "right": Padded(),
    "left": Padded("left"),
    "packed": DataCollatorWithFlattening(),
    "packed-flash": DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    "packed-seq-idx": DataCollatorWithFlattening(return_seq_idx=True),
}
EACH_COLLATOR = [(name, number % 2 == 0) for number, name in enumerate(COLLATORS)]  # streamed


@pytest.mark.parametrize(("collator", "streamed"), EACH_COLLATOR)
def test_retention_1_trains_as_trainer_does(tmp_path, collator, streamed):
    def run(cls, config):
        data = stream(ragged()) if streamed else ragged()
        model = with_lora(make_model("llama", "sdpa"))
        own = {"data": data, "model": model, "data_collator": COLLATORS[collator]}
        return losses(make_trainer(tmp_path, config, cls=cls, **own))

    assert run(LeMoTrainer, FULL) == pytest.approx(run(Trainer, None), rel=1e-5)


@pytest.mark.parametrize(("collator", "streamed"), EACH_COLLATOR)
def test_half_of_the_tokens_learn(tmp_path, collator, streamed):
    rows = ragged(6) * 8
    trainer = make_trainer(
        tmp_path,
        SPARSE,
        data=stream(rows) if streamed else rows,
        data_collator=COLLATORS[collator],
        max_steps=8,
    )
    found = losses(trainer)
    assert sum(found[-3:]) < sum(found[:3])
    assert all(log["lemo/attention_retention"] < 0.8 for log in trainer.state.log_history[:8])


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("policy", ["pooled", "oracle", "recent"])
def test_packed_documents_do_not_see_each_other(flash, policy):
    """What a document learns from its labels does not reach the tokens of the one before it."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
    packed = collator([{"input_ids": list(range(3, 46))}, {"input_ids": list(range(50, 91))}])
    packed["labels"][:, :44] = -100  # of the second document only
    model = make_model("llama")
    lemo = apply_lemo(model, LeMoConfig(block_size=8, policy=policy, retention=0.7))
    inputs = {name: value for name, value in packed.items() if torch.is_tensor(value)}
    inputs |= {name: value for name, value in packed.items() if name.startswith("max_length")}
    loss, gradients = loss_and_gradients(model, **inputs)
    assert loss > 0 and 0.5 < lemo.report()["attention_retention"] < 1
    embeddings = gradients["model.embed_tokens.weight"]
    assert embeddings[50:91].norm() > 0 and embeddings[3:46].norm() == 0


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63, 65])
def test_lengths_around_a_block(tokens):
    model = make_model("llama")
    expected, gradients = loss_and_gradients(model, **batch(tokens=tokens))
    apply_lemo(model, FULL)
    found, sparse = loss_and_gradients(model, **batch(tokens=tokens))
    if tokens > 1:  # one token has nothing to predict
        assert found == pytest.approx(expected, rel=1e-5)
        for name, gradient in gradients.items():
            assert relative_error(sparse[name], gradient) < 1e-4, name


def test_batches_that_are_too_large_become_smaller(tmp_path, monkeypatch):
    """`auto_find_batch_size` begins training anew after a step has run out of memory."""
    seen, stock = [], LeMoTrainer.compute_loss

    def small(self, model, inputs, *args, **kwargs):
        loss = stock(self, model, inputs, *args, **kwargs)
        seen.append(len(inputs["input_ids"]))
        if seen[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(LeMoTrainer, "compute_loss", small)
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, SPARSE, **settings)
    found = losses(trainer)
    assert seen[0] == 4 and seen[-1] <= 2 and all(0 < loss < 20 for loss in found)
    assert trainer.state.log_history[0]["lemo/attention_retention"] == 0.5
