"""The memory plan: against measured peaks, every allocation of tiny steps, and its own rules."""

import dataclasses
import json
import sys

import pytest
import torch
from support.allocations import LLAMA, PLANNED, QKVO, check_step, tiny
from support.models import SIZES, make_model
from support.paths import ROOT
from support.plans import longest, plan
from transformers import AutoConfig
from triton.runtime.jit import KernelInterface

from lemo_hf import LeMoConfig
from lemo_hf.config import LEVELS
from lemo_hf.core import sink_attention
from lemo_hf.kernels import launch
from lemo_hf.memory.offload import GIB
from lemo_hf.memory.recompute import by_tiles
from lemo_hf.planning.dry_run import _flash_buffers
from lemo_hf.planning.plan import Planner
from lemo_hf.planning.speed import CARDS, HOST, SHARES, step_seconds

sys.path.append(str(ROOT / "benchmarks"))

from plan_speed import Step, fitted
from plan_table import completions, key_of, measured, plan_table, planned, recorded

CASES = [(header, row) for header, rows in measured() for row in rows]
COMPLETIONS = [(header, row) for header, rows in completions() for row in rows]


# Each once: dense and sparse, every level, what recomputes and offloads, three models.
FEW = {
    *(("Llama-3 8B", 16, step) for step in ("hf", "lemo")),
    *(("Llama-3 8B", 64, f"lemo+{how}") for how in ("checkpointing", "some-offload")),
    ("Llama-3 8B", 64, "lemo+transformers-offload"),
    ("Llama-2 7B", 8, "lemo+mlp"),
    ("OPT-6.7B", 4, "lemo+selective"),
    ("Llama-3 8B", 16, "lemo+fp8"),
    *(("Llama-3 8B", tokens, f"liger{how}") for tokens, how in ((4, ""), (32, "+checkpointing"))),
}


def check_case(header, row):
    """Its peak, and the operations that were counted on the GPU, of which FP8's were not."""
    found = planned(header, row)
    assert found.peak / GIB == pytest.approx(row["peak_gib"], rel=0.03)
    assert found.work.flops - found.work.eight_bits == pytest.approx(row["flops"], rel=1e-3)
    return found


def test_measured_peaks_and_operations():
    found = {(row["model"], row["tokens"] // 1024, row["provider"]): (h, row) for h, row in CASES}
    for name in FEW:
        check_case(*found[name])


@pytest.mark.soak
def test_all_measured_steps_and_their_record():
    record, steps = recorded(), []
    for header, row in CASES:
        found, expected = check_case(header, row), record[key_of(header, row)]
        assert found.peak / GIB == pytest.approx(expected["gib"], rel=1e-3)
        assert 1e3 * step_seconds(found, CARDS["h200"]) == pytest.approx(expected["ms"], rel=1e-3)
        steps.append(Step(row["model"], row["tokens"], row["ms_median"], found))
    shares, host = fitted(steps)
    assert shares == pytest.approx(SHARES, rel=0.01) and host == pytest.approx(HOST, rel=0.01)


TITLES = ("| Llama", "| OPT", "| SmolLM2")


def test_their_table():
    assert sum(row["config"] is not None for _, row in CASES) >= 10
    lines = [line for line in plan_table().splitlines() if line.startswith(TITLES)]
    assert len(lines) == len(CASES) + len(COMPLETIONS) == len(recorded())
    for (_, row), line in zip(CASES + COMPLETIONS, lines, strict=True):
        assert f"| {row['peak_gib']:.2f} |" in line


KINDS = ("llama", "mixtral", "gemma3_text", "olmo2", "phi3", "opt", "cohere", "gpt_neox", "youtu")
KINDS += sink_attention.MODELS
# A sparse step as it is, a stock one with gradient checkpointing.
WAYS = pytest.mark.parametrize(
    ("lemo", "checkpointing"), [({"retention": 0.5}, False), (None, True)], ids=["lemo", "stock"]
)


@pytest.mark.oldest
@WAYS
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in KINDS else pytest.mark.soak) for family in PLANNED],
)
def test_every_allocation_of_a_step(family, lemo, checkpointing, launched):
    check_step(lemo, family, checkpointing=checkpointing)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_of_attention_with_sinks(level, launched):
    lemo = {"retention": 0.5, "mlp_retention": 0.25, "recompute": level}
    check_step(lemo, "gpt_oss", targets=None, layers=7)


@pytest.mark.oldest
def test_layerdrop_leaves_no_layer_out():
    """Chance may leave none out, which takes the most."""
    config = make_model("opt", "sdpa", layerdrop=0.5).config
    dropping = plan(config, None, 64).phases
    config.layerdrop = 0.0
    assert dropping == plan(config, None, 64).phases


def test_buffers_of_a_gpus_attention():
    """Heads of 72, as sinks make them of 64, are 96 wide in the sum of the queries' gradient."""
    query, key = (torch.empty(2, heads, 10, 72, dtype=torch.bfloat16) for heads in (8, 2))
    assert _flash_buffers(query, query) == 4 * 2 * 8 * 10 * 96
    assert _flash_buffers(query, key) == 2 * 8 * 10 * (4 * 96 + 2 * 2 * 72)


@WAYS
@pytest.mark.parametrize(
    "options",
    [
        {"targets": "all-linear"},
        {"targets": "all-linear", "adapter_dtype": "float32"},
        {"targets": "all-linear", "adapter_dtype": "float32", "autocast": True},
        {"adapter_dtype": "float32", "autocast": True},
        {"targets": ("q_proj", "v_proj")},
        {"targets": ("gate_proj", "up_proj", "down_proj")},
        {"targets": None},
        {"targets": None, "tie_word_embeddings": True},
        {"targets": None, "vocab_size": 1024, "autocast": True},
        {"vocab_size": 1024},
    ],
    ids=str,
)
def test_what_is_trained(options, lemo, checkpointing, launched):
    check_step(lemo, checkpointing=checkpointing, **options)


@pytest.mark.parametrize(
    "lemo",
    [
        {"retention": 0.5, "mlp_retention": 0.25},
        {"retention": 0.5, "mlp_retention": 0.75},
        {"retention": 0.5, "dense_first_layers": 1, "dense_last_layers": 1},
        {"retention": (0.25, 0.5, 1.0), "agree_across_layers": False},
        {"retention": 0.5, "supervise": "all"},
        {"retention": 0.5, "recompute": "full"},
        {"retention": 0.3, "segment_size": 32},
    ],
    ids=str,
)
def test_what_is_left_out(lemo, launched):
    check_step(lemo, checkpointing=True)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_of_recomputation(level, launched):
    """Of many layers, most of which are not there when the plan runs."""
    check_step({"retention": 0.5, "recompute": level}, layers=7)


@pytest.mark.parametrize("level", ["none", "selective"])
@pytest.mark.parametrize(
    "lemo",
    [
        {"dense_first_layers": 2},
        {"dense_last_layers": 2},
        {"mlp_retention": 0.25},
        {"mlp_retention": 0.75, "dense_first_layers": 1},
        {"retention": (0.25, 0.5, 1.0, 0.5, 0.25), "agree_across_layers": False},
    ],
    ids=str,
)
def test_levels_and_what_is_left_out(lemo, level, launched):
    # Of layers that do not agree only the data know how many tokens are asked for.
    within = 0.015 if lemo.get("agree_across_layers", True) else 0.03
    check_step({"retention": 0.5, "recompute": level, **lemo}, layers=5, within=within)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_and_what_is_trained(level, launched):
    check_step({"retention": 0.5, "recompute": level}, targets=None)


@pytest.mark.parametrize(
    "levels",
    [("mlp", "mlp", "none", "none"), ("full", "mlp", "selective", "none"), ("none", *3 * ["full"])],
    ids="-".join,
)
def test_a_level_for_each_layer(levels, launched):
    expected = check_step({"retention": 0.5, "recompute": levels}, layers=4)
    assert expected.levels == levels


@pytest.mark.usefixtures("own_dry_models")
@pytest.mark.parametrize(
    ("level", "targets", "rows"), [("mlp", None, 64), ("selective", QKVO, 100), ("full", None, 128)]
)
def test_tiles(level, targets, rows, launched, monkeypatch):
    monkeypatch.setattr("lemo_hf.memory.recompute.LEAST_ROWS", rows)
    monkeypatch.setattr("lemo_hf.memory.recompute.TILE_BYTES", 0)
    check_step({"retention": 0.5, "recompute": level}, targets=targets)


@pytest.mark.parametrize(
    ("level", "slabs"), [("selective", 2), ("lean", 5), ("selective", 1000), ("full", 1000)]
)
def test_offload(level, slabs, launched, monkeypatch):
    """Host memory is the CPU's own here, and takes whole slabs."""
    slab = 30011
    for module in ("memory.offload", "planning.dry_step"):
        monkeypatch.setattr(f"lemo_hf.{module}.SLAB", slab)
    monkeypatch.setattr("lemo_hf.memory.offload.SMALL", 10000)
    lemo = {"retention": 0.5, "recompute": level, "offload_gib": slabs * slab / GIB}
    lemo |= {"dense_first_layers": 3}
    planned = plan(tiny(layers=6)[1], LeMoConfig(block_size=16, **lemo), 512, autocast=False)
    assert 0 < planned.pinned <= slabs * slab and planned.pinned % slab == 0
    # No copy of the CPU's is on its way out while others are made.
    monkeypatch.setattr("lemo_hf.planning.dry_host.LEAVING", 0)
    check_step(lemo, layers=6, existing=planned.pinned)


def test_rows_and_lengths(launched):
    check_step({"retention": 0.5}, rows=3)
    check_step({"retention": 0.5}, tokens=500, checkpointing=True)
    check_step(None, tokens=500, rows=2)


def test_adapters():
    for family in ("llama", "phi3"):
        model, config, _ = tiny(family, targets="all-linear")
        expected = plan(config, None, 64, lora_targets="all-linear", autocast=False)
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert expected.parts["adapters"] == 4 * adapters


def test_parts_add_up_and_name_the_highest_phase():
    expected = plan(LLAMA, LeMoConfig(), 8192)
    assert sum(expected.parts.values()) == expected.peak == max(expected.phases.values())
    assert expected.phases[expected.phase] == expected.peak
    assert all(size > 0 for size in expected.parts.values())
    assert expected.fits(expected.peak / 2**30)
    assert not expected.fits((expected.peak - 1) / 2**30)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_tokens_and_higher_retention_take_more(checkpointing):
    def peak(retention, tokens):
        lemo = LeMoConfig(retention=retention)
        return plan(LLAMA, lemo, tokens, gradient_checkpointing=checkpointing).peak

    by_length = [peak(0.5, tokens) for tokens in range(1000, 40000, 13000)]
    assert by_length == sorted(set(by_length))
    by_share = [peak(share / 10, 32768) for share in range(1, 11, 3)]
    assert by_share == sorted(by_share) and by_share[0] < by_share[-1]


def test_free_memory_chooses_the_level():
    """By the formula of `lemo_hf.memory.fitting`; what is asked for stays."""

    def levels(memory, **options):
        config = LeMoConfig(retention=0.5, dense_first_layers=4, **options)
        settings = {"gradient_checkpointing": True, "memory_gib": memory}
        return plan(LLAMA, config, 65536, **settings).levels

    assert levels(None) == levels(100) == ("selective",) * 32
    assert levels(60) == ("selective",) * 32
    assert levels(48) == ("lean",) * 32 != levels(48, recompute="selective")
    assert levels(40) == ("full",) * 32 != levels(40, offload_gib=60)
    assert levels(30, offload_gib=100) == ("selective",) * 32
    mixed = ("none",) * 16 + ("full",) * 16
    assert levels(60, recompute=mixed) == mixed
    # Rows, outputs and sums, 0.5 GiB each of a dense layer and 0.25 of the others; 16 times the
    # rows, two tiles, and one in reserve.
    there = 12.6 + 0.06 + 0.03 + 0.06 + 0.5  # weights, adapters, workspaces, ids, stream
    for parts, above, below in ((3, "selective", "lean"), (2, "lean", "full")):
        needed = there + parts * (4 * 0.5 + 28 * 0.25) + 16 * 0.5 + 2 + 1
        assert levels(needed + 0.5) == (above,) * 32
        assert levels(needed - 0.5) == (below,) * 32


@pytest.mark.parametrize(
    ("mlp_retention", "offload_gib"),
    [
        (0.5, 30),
        pytest.param(None, None, marks=pytest.mark.soak),
        pytest.param(1.0, 100, marks=pytest.mark.soak),
    ],
)
def test_what_free_memory_chooses_fits(mlp_retention, offload_gib):
    """The formula is a bound: the plan, which knows every tensor, never says more."""
    options = {"mlp_retention": mlp_retention, "offload_gib": offload_gib}
    settings = {"gradient_checkpointing": True, "adapter_dtype": "bfloat16", "autocast": False}
    chosen, planner = set(), Planner(LLAMA, **settings)
    for dense, retention in ((0, 0.3), (4, 0.8)):
        config = LeMoConfig(
            retention=retention, dense_first_layers=dense, agree_across_layers=False, **options
        )
        for memory, tokens in ((24, 16000), (24, 131072), (80, 131072)):
            found = planner.plan(config, tokens, memory * GIB)
            chosen.add(found.levels[-1])
            assert found.levels[-1] == "full" or found.peak <= memory * GIB
    assert {"selective", "full"} <= chosen


@pytest.mark.soak
def test_longest_rows_by_level():
    """Full goes furthest, and is what free memory chooses there."""
    planner = Planner(LLAMA, gradient_checkpointing=True)
    found = {
        level: planner.longest(LeMoConfig(policy="recent", recompute=level), 24 * GIB)
        for level in (*LEVELS, None)
    }
    assert found["none"] < found["mlp"] < found["selective"] < found["lean"] < found["full"]
    assert found["full"] == found[None]
    offloaded = LeMoConfig(policy="recent", recompute="full", offload_gib=1000)
    assert planner.longest(offloaded, 24 * GIB) > 1.5 * found["full"]


@pytest.mark.usefixtures("own_dry_models")
def test_kernels_launch_again_after_a_plan(monkeypatch):
    """What a plan alters for its time is as it was, after an error too."""

    def state():
        return KernelInterface.__getitem__, launch.DEVICES, launch.WIDENING, launch.PLAIN

    before = state()
    plan(tiny()[1], LeMoConfig(block_size=16), 64)
    assert state() == before
    monkeypatch.setattr("lemo_hf.planning.dry_run.DryRun._add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan(tiny()[1], LeMoConfig(block_size=16), 80)
    assert state() == before


def test_pinned_memory_is_bounded():
    """By whole slabs; and the device has what does not fit."""
    peaks = []
    for gib in (None, 4, 1000):
        lemo = LeMoConfig(retention=0.5, recompute="full", offload_gib=gib)
        found = plan(LLAMA, lemo, 65536)
        peaks.append(found.peak)
        most = {None: 0, 4: 4, 1000: 31 * 0.25}[gib]  # all but the last layer's
        assert found.pinned == most * GIB
    assert peaks == sorted(set(peaks), reverse=True)


def test_less_is_taken_than_by_the_stock_model():
    for checkpointing in (False, True):
        stock = plan(LLAMA, None, 16384, gradient_checkpointing=checkpointing).peak
        sparse = plan(LLAMA, LeMoConfig(), 16384, gradient_checkpointing=checkpointing).peak
        assert sparse < stock


@pytest.mark.parametrize(
    ("lemo", "checkpointing"),
    [(LeMoConfig(policy="recent", retention=0.3, block_size=48), True), (None, False)],
    ids=["lemo", "stock"],
)
def test_the_longest_row_is_the_boundary(lemo, checkpointing):
    settings = {"gradient_checkpointing": checkpointing}
    tokens, size = longest(LLAMA, lemo, 40, **settings), 48 if lemo else 64
    settings["memory_gib"] = 40
    assert tokens % size == 0 and tokens > 0
    assert plan(LLAMA, lemo, tokens, **settings).fits(40)
    assert not plan(LLAMA, lemo, tokens + size, **settings).fits(40)
    settings |= {"memory_gib": 45, "reserve_gib": 5}
    assert longest(LLAMA, lemo, **settings) == tokens


def test_looking_ends_somewhere(monkeypatch):
    """A small model on a large card would be looked at for hours."""
    monkeypatch.setattr("lemo_hf.planning.plan.FARTHEST", 4096)
    assert longest(AutoConfig.for_model("llama", **SIZES), LeMoConfig(), 80) == 4096


def test_no_row_fits_beside_the_weights_and_windows_bound_them():
    assert longest(LLAMA, LeMoConfig(), 5) == 0
    config = AutoConfig.for_model("mistral", sliding_window=1000)
    assert longest(config, LeMoConfig(), 70) == 960


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_adapters_on_attention_by_default(kind, lemo, tmp_path):
    """Phi has q, k and v in one linear."""
    config = AutoConfig.for_model(kind, attention_dropout=0.0)
    config.save_pretrained(tmp_path)
    code, out, err = lemo("plan", "--model", tmp_path, "--tokens", 1024, "--json")
    assert code == 0, err
    targets = ["qkv_proj", "o_proj"] if kind == "phi3" else [*QKVO]
    assert json.loads(out)["lora_targets"] == targets
    found = plan(config, LeMoConfig(retention=0.3), 1024)
    assert found == plan(config, LeMoConfig(retention=0.3), 1024, lora_targets=targets)
    assert json.loads(out)["LeMo"]["peak"] == found.peak


@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_what_repeats_is_counted_as_if_it_ran(recompute, monkeypatch):
    """Segments of the loss, and tiles of rows: many more than those that a plan runs."""
    config = AutoConfig.for_model("llama", **SIZES | {"vocab_size": 4096, "hidden_size": 256})
    lemo, counted = LeMoConfig(recompute=recompute, segment_size=512), []
    monkeypatch.setattr("lemo_hf.memory.recompute.TILE_BYTES", 2**17)
    monkeypatch.setattr("lemo_hf.memory.recompute.LEAST_ROWS", 256)
    for whole in (False, True):
        if whole:
            monkeypatch.setattr("lemo_hf.planning.work.Ledger.starts", range_of)
            monkeypatch.setattr("lemo_hf.planning.dry_run.DryRun._some_tiles", all_tiles)
        counted.append(Planner(config, gradient_checkpointing=True).plan(lemo, 16384))
    few, all_of_them = (dataclasses.asdict(found.work) for found in counted)
    # A part that is run in place of others reads the weights as often as it stands for them.
    assert few == pytest.approx(all_of_them, rel=0.03)
    assert few["products"] == all_of_them["products"]
    assert dataclasses.replace(counted[0], work=counted[1].work) == counted[1]


def range_of(_, count, size):
    assert count > 5 * size
    return range(0, count, size)


def all_tiles(_, *args):
    return by_tiles(*args)
