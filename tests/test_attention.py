"""Which of PyTorch's attention kernels is used, and whether its outputs may be kept."""

from types import SimpleNamespace

import pytest
import torch
from models import batch, make_model
from torch.nn.attention import SDPBackend

from lemo_hf import LeMoConfig, apply_lemo, attention, memory
from lemo_hf.attention import fastest_attention, using
from lemo_hf.families import FAMILIES
from lemo_hf.offload import GIB, HostMemory

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


def module(implementation="sdpa", key_heads=2):
    config = SimpleNamespace(
        _attn_implementation=implementation,
        num_attention_heads=8,
        num_key_value_heads=key_heads,
        hidden_size=512,
    )
    return SimpleNamespace(config=config, head_dim=64)


@pytest.fixture
def timed(monkeypatch):
    """Times of the candidates, in place of trials; what was tried."""
    times, tried = {CUDNN: 2.0, FLASH: 1.0}, []

    def milliseconds(backend, *shape):
        tried.append((backend, *shape[:3]))
        if times[backend] is None:
            raise RuntimeError("No available kernel")
        return times[backend]

    attention._tried.cache_clear()
    monkeypatch.setattr(attention, "_milliseconds", milliseconds)
    yield times, tried
    attention._tried.cache_clear()


def test_the_fastest_comes_first_and_is_found_once(timed):
    times, tried = timed
    device = torch.device("cuda")
    for _ in range(2):
        order = fastest_attention(module(), device, torch.bfloat16)
        assert order[:2] == (FLASH, CUDNN) and SDPBackend.MATH in order
    assert tried == [(CUDNN, 8, 2, 64), (FLASH, 8, 2, 64)]
    times[FLASH] = None  # not built for such heads
    order = fastest_attention(module(key_heads=8), device, torch.bfloat16)
    assert order[0] == CUDNN and FLASH not in order
    times[CUDNN] = None
    assert fastest_attention(module(key_heads=4), device, torch.bfloat16) is None


def test_other_implementations_devices_and_precisions_are_left_alone(timed):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert fastest_attention(module(), cpu, torch.bfloat16) is None
    assert fastest_attention(module(), cuda, torch.float32) is None
    assert fastest_attention(module("flash_attention_2"), cuda, torch.bfloat16) is None
    assert not timed[1]


def test_an_order_holds_inside_alone():
    query = torch.randn(1, 2, 8, 4)
    before = torch._C._get_sdp_priority_order()
    with using((SDPBackend.MATH,)):
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before
    with using(None):
        assert torch._C._get_sdp_priority_order() == before


def test_the_log_line_names_it():
    lemo = apply_lemo(make_model("llama", "sdpa"), LeMoConfig(block_size=8))
    assert "attention by sdpa;" in lemo.describe()


def test_outputs_are_kept_where_they_fit(monkeypatch):
    """Of as many layers as there is room for, those with most rows first."""
    layer = make_model("llama", "sdpa").model.layers[0]
    shape, size = (1, 4096, 32), 4
    x = SimpleNamespace(
        device=torch.device("cuda"), shape=torch.Size(shape), element_size=lambda: size
    )
    rows = (2048, 4096, 2048, 4096)
    # Rows, sums, and attention's output of 4 heads of 8.
    all_rows, more = sum(rows) * 32 * size, [n * (32 + 32) * size for n in rows]
    # The stream's gradient, and an MLP at work.
    working = (1 + 5) * 4096 * 32 * size + 2 * memory.TILE_BYTES + memory.RESERVE

    def kept(free, trained=0, host=None):
        free += free // (memory.SPARE - 1) + 1
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        return memory.layers_with_room(layer, FAMILIES["llama"], x, rows, trained, host)

    least = all_rows + working
    assert kept(least + more[1] - 9) == (False,) * 4
    assert kept(least + more[1]) == (False, True, False, False)
    assert kept(least + more[1] + more[3]) == (False, True, False, True)
    assert kept(least + sum(more) - 9) == (True, True, False, True)
    assert kept(least + sum(more)) == (True,) * 4
    # Gradients and optimizer states to come.
    assert kept(least + sum(more), trained=3) == (True, True, False, True)
    everything = HostMemory(1.1 * (all_rows + sum(more)) / GIB + 0.1, 31)
    # None stays, but for two layers' on their way.
    way = 2 * 4096 * (32 + 64) * size
    assert kept(working + way, host=everything) == (True,) * 4
    assert kept(working + way - 9, host=everything) == (False,) * 4


def test_too_little_memory_means_that_attention_runs_again(monkeypatch):
    model = make_model("llama", "sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lemo = apply_lemo(model, LeMoConfig(block_size=8))
    chosen = (False, True, False, False)
    monkeypatch.setattr("lemo_hf.passes.layers_with_room", lambda *_: chosen)
    levels = []
    monkeypatch.setattr(
        "lemo_hf.layer.checkpointed",
        lambda run, rows, level, *_: (levels.append(level), run(rows))[1],
    )
    model(**batch(1, 64)).loss.backward()
    assert levels == ["full", "selective", "full", "full"]
    assert list(lemo.passes.keep_attention.values()) == [chosen]  # asked once for a shape
