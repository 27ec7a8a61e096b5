"""Plans of completions, and of GPUs without Triton."""

import json
import sys

import pytest
import torch
from support.allocations import LLAMA, check_step, tiny
from support.models import make_model
from support.paths import ROOT
from support.plans import plan, plans
from torch.nn.attention import SDPBackend, sdpa_kernel

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core import whole_heads
from lemo_hf.memory.offload import GIB
from lemo_hf.planning.dry_run import _by_token
from lemo_hf.planning.speed import CARDS, step_seconds

sys.path.append(str(ROOT / "benchmarks"))

from plan_table import completions, key_of, planned, recorded

# What `torch.cuda.memory_snapshot()` shows before Hopper after a first product, bytes. Source:
# https://discuss.pytorch.org/t/178671
SMALL_WORKSPACE = 8519680
COMPLETIONS = [(header, row) for header, rows in completions() for row in rows]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        pytest.param(*case, marks=() if i in (4, 16) else pytest.mark.soak)
        for i, case in enumerate(COMPLETIONS)
    ],
    ids=[f"{row['provider']}, {row['tokens']}" for _, row in COMPLETIONS],
)
def test_measured_peaks_of_completions(header, row):
    """Graphs hold up to 0.1 GiB more than is planned."""
    found, expected = planned(header, row), recorded()[key_of(header, row)]
    assert found.peak / GIB == pytest.approx(row["peak_gib"], rel=0.005, abs=0.1)
    assert found.peak / GIB == pytest.approx(expected["gib"], rel=1e-3)
    assert 1e3 * step_seconds(found, CARDS["h200"]) == pytest.approx(expected["ms"], rel=1e-3)


@pytest.mark.parametrize("labels", [None, 40])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_allocation_without_triton(checkpointing, labels, alike, monkeypatch):
    """As a GPU runs it for which Triton makes no code, but for the layout of attention's output."""
    monkeypatch.setattr("lemo_hf.planning.dry_run._by_token", lambda x: x)
    monkeypatch.setattr(whole_heads, "are_needed", lambda x, _: whole_heads.share_keys(x))
    settings = {"dtype": torch.float16, "adapter_dtype": "float16", "triton": False}
    check_step({"retention": 0.5}, checkpointing=checkpointing, labels=labels, **settings)


@pytest.mark.parametrize("level", ["none", "selective"])
def test_every_allocation_of_a_completion(level, launched):
    """40 labels: the head reads no other rows."""
    check_step({"retention": 0.25, "recompute": level}, layers=5, labels=40)


def test_attention_is_planned_whatever_is_set():
    lemo = LeMoConfig(block_size=16)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        found = plan(tiny()[1], lemo, 512)
    assert found == plan(tiny()[1], lemo, 512)


def test_attention_without_triton_has_a_layout_of_its_own():
    given = torch.empty(2, 8, 10, 4)
    assert _by_token(given).stride() == (320, 4, 32, 1) and _by_token(given).shape == given.shape


def test_a_completion_has_no_finish_that_was_not_asked_for():
    assert list(plans(LLAMA, LeMoConfig(), 4096)) == ["sparse", "finish"]
    assert list(plans(LLAMA, LeMoConfig(), 4096, labels=100)) == ["sparse"]
    assert list(plans(LLAMA, LeMoConfig(dense_finish=0.1), 4096, labels=100)) == [
        "sparse",
        "finish",
    ]


def test_the_command_plans_completions(lemo, tmp_path):
    config = tiny()[1]
    config.save_pretrained(tmp_path)
    options = ("plan", "--model", tmp_path, "--tokens", 1024, "--labels", 64)
    code, out, err = lemo(*options, "--json")
    assert code == 0, err
    found, few = json.loads(out), plan(config, LeMoConfig(), 1024, labels=64)
    assert found["LeMo"]["peak"] == few.peak
    assert found["without"]["peak"] == plan(config, None, 1024, labels=64).peak
    assert "finish" not in found
    assert "--labels 2000: a row has 1024" in lemo(*options, "--labels", 2000)[2]


def test_nothing_is_said_of_a_planned_row(caplog):
    """In training it is: more of its blocks have labels than are to be kept."""
    lemo, config = LeMoConfig(retention=0.1, block_size=16), tiny()[1]
    plan(config, lemo, 512, labels=256)
    assert not caplog.records
    model = make_model("llama", "sdpa")
    apply_lemo(model, lemo)
    ids = torch.randint(97, (1, 512))
    labels = ids.clone()
    labels[:, :256] = -100
    model(input_ids=ids, labels=labels)
    assert "more than retention 0.1 allows" in caplog.text


def test_the_gpu_here_may_be_an_old_one(lemo, tmp_path, monkeypatch):
    tiny()[1].save_pretrained(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr("lemo_hf.kernels.launch.settle", lambda _: "compute capability 7.5")
    code, out, err = lemo("plan", "--model", tmp_path, "--tokens", 1024, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["gpu"] == "Tesla T4" and found["dtype"] == "float16" and not found["triton"]
    assert found["LeMo"]["parts"]["cuBLAS workspaces"] == 2 * SMALL_WORKSPACE


def test_workspaces_are_those_of_the_gpu(lemo, tmp_path):
    tiny()[1].save_pretrained(tmp_path)

    def workspaces(*gpu):
        code, out, err = lemo("plan", "--model", tmp_path, "--tokens", 1024, "--json", *gpu)
        assert code == 0, err
        return json.loads(out)["LeMo"]["parts"]["cuBLAS workspaces"]

    assert workspaces() == workspaces("--gpu", "h100") == 2 * 32 * 2**20
    assert workspaces("--gpu", "a100") == workspaces("--gpu", "v100") == 2 * SMALL_WORKSPACE


def test_the_command_plans_old_gpus(lemo, tmp_path):
    config = tiny()[1]
    config.save_pretrained(tmp_path)
    options = ("plan", "--model", tmp_path, "--tokens", 1024, "--gpu", "t4")
    code, out, err = lemo(*options, "--json")
    assert code == 0, err
    found = json.loads(out)
    expected = plan(config, LeMoConfig(), 1024, dtype="float16", triton=False, capability=7)
    assert found["LeMo"]["peak"] == expected.peak and found["gpu"] == "NVIDIA T4"
    assert "without" not in found and "step_ms" not in found["LeMo"]
    code, out, _ = lemo(*options, "--load-in-4bit")
    assert code == 0 and "nothing was measured on such a card" in out
    assert out.splitlines()[0].split() == ["MiB", "LeMo", "finish"]
    assert "no bfloat16 either: give dtype='float16'" in lemo(*options, "--dtype", "bfloat16")[2]
