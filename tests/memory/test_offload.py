"""Host memory for what layers store: bounded, used again, and invisible in the result."""

import gc

import pytest
import torch
from support.models import make_model, with_lora
from support.passes import assert_same, run
from support.trainers import make_trainer

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.config import UNITS
from lemo_hf.memory import offload
from lemo_hf.memory.offload import GIB, HostMemory, Stored
from lemo_hf.memory.out_of_memory import CHECKPOINTING


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(offload, "SLAB", 1024)
    monkeypatch.setattr(offload, "SMALL", 64)


def memory(slabs, last=99):
    return HostMemory(slabs * 1024 / GIB, last)


def test_what_was_stored_comes_back():
    host = memory(slabs=20)
    tensors = [
        torch.randn(3, 171),
        torch.randn(2, 30, 4, 3).transpose(1, 2),
        torch.randn(700).bfloat16(),
        torch.randint(9, (5, 60)),
    ]
    stored = [host.put(tensor, unit) for unit, tensor in enumerate(tensors)]
    assert all(isinstance(entry, Stored) for entry in stored)
    for entry, tensor in reversed(list(zip(stored, tensors, strict=True))):
        back = host.get(entry)
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)
        assert back.stride() == tensor.stride()
        assert torch.equal(host.get(entry), tensor)  # a second backward reads it again


def test_the_budget_is_kept_and_slabs_are_used_again():
    host = memory(slabs=4)
    for _ in range(3):
        first, second = (host.put(torch.randn(2, 256), unit) for unit in (0, 1))
        assert isinstance(first, Stored) and isinstance(second, Stored)
        assert torch.is_tensor(host.put(torch.randn(2, 256), 2))  # does not fit: stays
        del first, second
        gc.collect()
    assert host.pinned_bytes == 4 * 1024


def test_the_unit_before_is_fetched_ahead():
    host = memory(slabs=20)
    stored = [host.put(torch.randn(256), unit) for unit in (0, 1, 1, 2)]
    host.get(stored[3])
    assert [entry.fetched is not None for entry in stored] == [False, True, True, False]
    host.get(stored[2])
    assert [entry.fetched is not None for entry in stored] == [True, True, False, False]


def test_nothing_is_fetched_twice(monkeypatch):
    """What was handed out to a unit stays out while the rest of the unit is asked for."""
    fetches, real = [], HostMemory._fetch
    monkeypatch.setattr(
        HostMemory, "_fetch", lambda self, entry: (fetches.append(entry), real(self, entry))
    )
    host = memory(slabs=20)
    stored = [host.put(torch.randn(256), unit) for unit in (0, 0, 1, 1)]
    for entry in reversed(stored):
        host.get(entry)
    assert len(fetches) == 4


def test_small_tensors_slices_and_the_last_unit_stay():
    host = memory(slabs=4, last=3)
    assert torch.is_tensor(host.put(torch.randn(40, 40)[:, :20], 0))
    assert torch.is_tensor(host.put(torch.randn(4), 0))
    assert torch.is_tensor(host.put(torch.randn(1000), 3))


@pytest.mark.parametrize("level", UNITS)
@pytest.mark.parametrize("slabs", [20, 10_000])
def test_training_is_the_same(level, slabs, monkeypatch):
    """With room for everything, and with room for a part."""
    model = with_lora(make_model("llama", "sdpa"))
    put, stored = HostMemory.put, []

    def counting(self, tensor, unit):
        entry = put(self, tensor, unit)
        stored.append(isinstance(entry, Stored))
        return entry

    monkeypatch.setattr(HostMemory, "put", counting)
    ours = run(model, recompute=level, offload_gib=slabs * 1024 / GIB)
    assert any(stored) and not all(stored)
    assert_same(ours, run(model, recompute="none"))


def test_a_pass_without_backward_gives_its_slabs_back():
    model = with_lora(make_model("llama", "sdpa"))
    lemo = apply_lemo(model, LeMoConfig(block_size=8, recompute="full", offload_gib=1e-3))
    ids = torch.randint(3, 97, (1, 64))
    for _ in range(4):
        model(input_ids=ids, labels=ids)
    gc.collect()
    host = lemo.passes.host
    assert host.pinned_bytes == len(host._free) * 1024 <= 2 * 3 * 4 * 1024
    remove_lemo(model)


@pytest.mark.parametrize("value", [0, -1, "8", True, float("inf")])
def test_wrong_budgets_are_refused(value):
    with pytest.raises(ValueError, match="offload_gib"):
        LeMoConfig(offload_gib=value)


def test_a_run_says_that_nothing_is_offloaded(tmp_path, capsys):
    config = LeMoConfig(block_size=8, dense_finish=0, offload_gib=1)
    said = "in every step. offload_gib=1 has no effect: no layer is computed again"
    for again in (False, True):
        make_trainer(tmp_path, config, max_steps=1, **{CHECKPOINTING: again}).train()
        assert (said in capsys.readouterr().out) is not again
