"""Which of PyTorch's attention kernels is used, and whether its outputs may be kept."""

from types import SimpleNamespace

import pytest
import torch
from support.models import batch, make_model, with_lora
from torch.nn.attention import SDPBackend

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.config import UNITS
from lemo_hf.core import attention
from lemo_hf.core.attention import fastest_attention, using
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.memory import fitting as memory

pytestmark = pytest.mark.oldest

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
    assert "attention by sdpa." in lemo.describe()


STREAM, WIDTH, SIZE = (1, 4096, 32), 64, 4  # twice as wide as the stream: rows, sum 32, output 64
HALF, ALL = 2048, 4096
WORKING = memory.WORKING_ROWS * 4096 * 32 * SIZE + 2 * memory.TILE_BYTES + memory.RESERVE


def level_of(rows, room, trained=0, slabs=0):
    return memory.fitting_level(rows, STREAM, WIDTH, SIZE, trained, slabs, room)


@pytest.mark.parametrize(
    ("rows", "selective", "lean"),
    [
        ([(HALF, None)] * 4, 4 * HALF * 128, 4 * HALF * 96),
        ([(ALL, None), (HALF, None)], (ALL + HALF) * 128, (ALL + HALF) * 96),
        # An MLP with a set of its own stores its rows at every level, and no sum.
        ([(HALF, 1000)] * 3, 3 * (HALF * 96 + 1000 * 32), 3 * (HALF * 96 + 1000 * 32)),
    ],
)
def test_what_fits_is_kept(rows, selective, lean):
    """Elements that layers store, dense ones and others, against the room there is."""
    found = [level_of(rows, WORKING + SIZE * stored) for stored in (selective, lean)]
    assert found == ["selective", "selective" if selective == lean else "lean"]
    assert level_of(rows, WORKING + SIZE * lean - 1) == "full"
    # Gradients and optimizer states may be still to come.
    room = WORKING + SIZE * selective + 30
    assert level_of(rows, room, trained=10) == "selective" != level_of(rows, room, trained=11)


def test_host_memory_takes_whole_slabs_of_all_but_the_last_layer():
    """Rows and sum of a layer are 16 MiB each and its output 32: a slab of 64 for any of them."""
    rows, layer = [(64 * HALF, None)] * 4, SIZE * 64 * HALF * 128
    assert level_of(rows, WORKING + layer, slabs=9) == "selective"
    assert level_of(rows, WORKING + layer, slabs=8) == "lean"  # 6 of 8 are enough
    assert level_of(rows, WORKING + layer, slabs=4) == "full"


@pytest.mark.parametrize("offload_gib", [None, 1])
def test_what_a_model_asks_for(offload_gib, monkeypatch):
    """Heads twice as wide as the stream, adapters and host memory; the GPU is pretended."""
    model = with_lora(make_model("llama", "sdpa", head_dim=16))
    lemo = apply_lemo(model, LeMoConfig(block_size=8, offload_gib=offload_gib))
    x = SimpleNamespace(
        device=torch.device("cuda"), shape=torch.Size(STREAM), element_size=lambda: SIZE
    )
    rows = [(64 * HALF, None)] * 4
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    slabs = 0 if offload_gib is None else 16
    found = []
    for room in range(WORKING, WORKING + 2**28 + 2**26, 2**23):
        free = room + 3 * trained
        monkeypatch.setattr("lemo_hf.core.levels.free_bytes", lambda _, free=free: free)
        found.append(lemo.passes.levels._fitting(x, rows))
        assert found[-1] == level_of(rows, room, slabs=slabs)
    assert found[0] == "full" and found[-1] == "selective"


def test_layers_say_what_they_store_before_they_choose():
    config = LeMoConfig(
        retention=(1.0, 0.5, 0.25), block_size=8, agree_across_layers=False, dense_first_layers=1
    )
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 20:] = 0  # 3 blocks, of which at least first and last are kept
    sparse_pass = SparsePass(config, (2, 64), torch.device("cpu"), attention_mask=mask)
    assert list(sparse_pass.stored_rows(3)) == [(128, None), (64, None), (32, None)]
    config = LeMoConfig(threshold=1.0, mlp_retention=0.25, block_size=8, agree_across_layers=False)
    sparse_pass = SparsePass(config, (2, 64), torch.device("cpu"))
    assert list(sparse_pass.stored_rows(1)) == [(128, 32)]


@pytest.mark.parametrize("level", UNITS)
def test_layers_follow_what_fits(level, monkeypatch, caplog):
    model = make_model("llama", "sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lemo = apply_lemo(model, LeMoConfig(retention=0.5, block_size=8))
    asked = []
    monkeypatch.setattr(
        "lemo_hf.core.levels.Levels._fitting", lambda *ask: (asked.append(ask[2]), level)[1]
    )
    levels = []
    monkeypatch.setattr(
        "lemo_hf.core.layer.checkpointed",
        lambda run, rows, level, *_: (levels.append(level), run(rows))[1],
    )
    inputs = batch(1, 64)
    with caplog.at_level("INFO", "lemo_hf.core.levels"):
        for _ in range(2):
            model(**inputs).loss.backward()
    assert levels == [level] * 8
    assert caplog.messages == [f"recompute={level!r} fits the memory for batches of 1 x 64 tokens"]
    assert asked == [((32, None),) * 4]  # once for a shape and its rows
    inputs["labels"][:, :8] = inputs["labels"][:, 16:32] = -100  # the others are kept
    model(**inputs).loss.backward()
    kept = lemo.passes.tally.kept_blocks[0, "attention"].sum().item() * 8
    assert asked[1:] == [((kept, None),) * 4] and kept > 32
    monkeypatch.setattr("lemo_hf.core.levels.MOST_SHAPES", 2)
    model(**batch(1, 48)).loss.backward()
    assert len(lemo.passes.levels._found) == 1
