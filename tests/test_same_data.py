"""What is read of a dataset, and when: as by Trainer, draws by chance included."""

import random

import pytest
import torch
from datasets import Dataset
from support.trainers import SPARSE, dataset, losses, make_trainer
from transformers import Trainer

from lemo_hf import LeMoConfig

pytestmark = pytest.mark.oldest

LONG = LeMoConfig(block_size=128, policy="random", retention=0.5)


class Drawing(torch.utils.data.Dataset):
    """Rows drawn when they are read, by both generators that a dataset may use."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 16

    def __getitem__(self, index):
        self.read.append(index)
        tokens = random.randint(40, 64)
        ids = torch.randint(3, 97, (64,))
        return {"input_ids": ids[:64], "labels": torch.where(torch.arange(64) < tokens, ids, -100)}


def transformed():
    """A `datasets.Dataset` that draws when a row is read."""

    def draw(rows):
        ids = torch.randint(3, 97, (len(rows["number"]), 64)).tolist()
        return {"input_ids": ids, "labels": ids}

    return Dataset.from_list([{"number": i} for i in range(16)]).with_transform(draw)


@pytest.mark.parametrize("block_size", [8, 128])
@pytest.mark.parametrize("make", [Drawing, transformed])
def test_draws_are_those_of_trainer(tmp_path, make, block_size):
    """The same rows, and generators in the same state afterwards."""
    seen, states, found = [], [], []
    for cls, config in ((Trainer, None), (None, LeMoConfig(retention=1.0, block_size=block_size))):
        options = {} if cls is None else {"cls": cls}
        random.seed(5)
        torch.manual_seed(5)
        rows = make()
        trainer = make_trainer(
            tmp_path, config, data=rows, dataloader_num_workers=0, remove_unused_columns=False,
            **options,
        )  # fmt: skip
        batches = []
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs, batches=batches: batches.append(kwargs["input_ids"]),
            with_kwargs=True,
        )
        found.append(losses(trainer))
        seen.append(batches)
        states.append((random.getstate(), torch.get_rng_state(), getattr(rows, "read", None)))
    assert len(seen[0]) == len(seen[1]) == 4
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert states[0][0] == states[1][0] and torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def packed(samples):
    """A collator of one's own: all rows of a batch as one."""
    batch = {}
    for name in ("input_ids", "labels"):
        batch[name] = torch.cat([torch.tensor(sample[name]) for sample in samples])[None]
    return batch


def test_a_collator_may_pack(tmp_path):
    """Two rows of 64 tokens are a row of 128, in which a block of 128 tokens has a place."""
    trainer = make_trainer(tmp_path, LONG, data_collator=packed)
    assert len(losses(trainer)) == 4
    larger = LeMoConfig(block_size=200, policy="random")
    assert len(losses(make_trainer(tmp_path, larger, data_collator=packed))) == 4


@pytest.mark.parametrize("make", [list, Dataset.from_list])
def test_a_block_that_no_row_fills_is_refused(tmp_path, make):
    trainer = make_trainer(tmp_path, LONG, data=make(dataset()))
    with pytest.raises(ValueError, match=r"block_size=128 is larger than .* sequence \(64 tokens"):
        trainer.train()
    assert trainer.state.global_step == 0
    # Once more, on the same model, with one that fits.
    assert len(losses(make_trainer(tmp_path, SPARSE, model=trainer.model))) == 4


def test_short_rows_may_come_first(tmp_path):
    rows = [*dataset(7, tokens=20), *dataset(1, tokens=140)]
    trainer = make_trainer(tmp_path, LONG, data=rows, per_device_train_batch_size=1, max_steps=8)
    assert len(losses(trainer)) == 8
