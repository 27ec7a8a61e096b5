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


@pytest.mark.parametrize("free", [0.5, 1.5])
def test_outputs_are_kept_where_everything_fits(free, monkeypatch):
    """``free`` is in units of what the formula asks for."""
    layer = make_model("llama", "sdpa").model.layers[0]
    shape, rows, size = (1, 4096, 32), 2048, 4
    x = SimpleNamespace(
        device=torch.device("cuda"), shape=torch.Size(shape), element_size=lambda: size
    )
    stored = 32 * rows * (2 * 32 + 32) * size  # rows, sums, and attention's output of 4 heads of 8
    working = memory.WORKING_ROWS * 4096 * 32 * size + 2 * memory.TILE_BYTES + memory.RESERVE
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * (stored + working)))
    ask = (layer, FAMILIES["llama"], x, rows, 32)
    assert memory.attention_fits(*ask, 0, None) == (free > 1)
    assert not memory.attention_fits(*ask, working, None)  # gradients and optimizer states to come
    assert memory.attention_fits(*ask, 0, HostMemory(1.1 * stored / GIB + 0.1, 31))  # none stays


def test_too_little_memory_means_that_attention_runs_again(monkeypatch):
    model = make_model("llama", "sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lemo = apply_lemo(model, LeMoConfig(block_size=8))
    monkeypatch.setattr("lemo_hf.passes.attention_fits", lambda *_: False)
    levels = []
    monkeypatch.setattr(
        "lemo_hf.layer.checkpointed",
        lambda run, rows, level, *_: (levels.append(level), run(rows))[1],
    )
    inputs = batch(1, 64)
    for _ in range(2):
        model(**inputs).loss.backward()
    assert levels == ["full"] * 8
    assert list(lemo.passes._fits.values()) == [False]  # asked once for a shape and its rows
    inputs["labels"][:, :8] = inputs["labels"][:, 16:32] = -100  # the others are kept
    model(**inputs).loss.backward()
    assert len(lemo.passes._fits) == 2
