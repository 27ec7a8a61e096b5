"""What a step does, by the plan, and how long it takes: against counted and measured steps.

`test_plan.py` compares operations and peaks with those of an H200.
"""

import dataclasses
import json
import statistics
import sys

import pytest
import torch
from support.allocations import LLAMA, PLANNED, QKVO, tiny
from support.paths import ROOT
from support.plans import plan
from torch.utils._python_dispatch import TorchDispatchMode

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.cli.gpu import Gpu
from lemo_hf.core import sink_attention
from lemo_hf.memory.offload import GIB
from lemo_hf.planning.fused_rival import part_rows
from lemo_hf.planning.plan import Planner
from lemo_hf.planning.speed import CARDS, HOST, card_of, step_seconds

sys.path.append(str(ROOT / "benchmarks"))

from model_shapes import model_config
from plan_table import RESULTS, key_of, measured, recorded

H200 = CARDS["h200"]


# Where the first of the two that are multiplied stands.
FIRST = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, ``[..., M, K] @ [..., K, N]``."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = FIRST.get(function._schema.name.removeprefix("aten::"))
        if first is not None:
            left, right = args[first : first + 2]
            self.operations += 2 * left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


def operations(model, tokens=512):
    """Of the products of a real step."""
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    with Products() as counted:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counted.operations


@pytest.mark.parametrize("targets", [QKVO, None], ids=["lora", "all trained"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "lemo",
    [
        None,
        {"retention": 0.5},
        {"retention": 0.5, "dense_first_layers": 2, "mlp_retention": 0.25},
        *({"retention": 0.5, "recompute": level} for level in ("mlp", "selective", "lean", "full")),
    ],
    ids=str,
)
def test_operations_are_those_of_a_real_step(lemo, checkpointing, targets, launched):
    """Of seven layers, most of which are not there when the plan runs."""
    model, config, _ = tiny(layers=7, targets=targets)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lemo is not None:
        lemo = LeMoConfig(policy="recent", block_size=16, **lemo)
        apply_lemo(model, lemo)
    settings = {"lora_rank": None if targets is None else 8, "lora_targets": targets or ()}
    settings |= {"gradient_checkpointing": checkpointing, "adapter_dtype": "bfloat16"}
    found = plan(config, lemo, 512, autocast=False, **settings).work
    assert found.products == pytest.approx(operations(model), rel=1e-6)
    assert found.eight_bits == 0 and found.moved > 0 and found.launches > 100


FEW = ("mixtral", "gemma3_text", "olmo2", "phi3", "opt", "cohere", "gpt_neox", "gpt_oss")


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in FEW else pytest.mark.soak) for family in PLANNED],
)
def test_operations_of_every_family(family, launched):
    """And as many where kernels are fused, which take no more memory."""
    model, config, targets = tiny(family)
    if family in ("deepseek_v3", "glm4_moe_lite"):
        targets = None
        model, config, _ = tiny(family, targets=None)
    how = {"lora_rank": None if targets is None else 8, "lora_targets": targets or ()}
    planner = Planner(config, adapter_dtype="bfloat16", autocast=False, **how)
    stock, fused = (planner.plan(None, 512, fused=x) for x in (False, True))
    assert stock.work.products == pytest.approx(operations(model), rel=1e-6)
    assert fused.work.products == pytest.approx(stock.work.products, rel=1e-6)
    assert fused.peak <= stock.peak
    lemo = LeMoConfig(policy="recent", block_size=16, retention=0.5)
    apply_lemo(model, lemo)
    assert planner.plan(lemo, 512).work.products == pytest.approx(operations(model), rel=1e-6)
    assert planner.plan(None, 512) == stock  # the model is as it was


def test_attention_by_its_formula():
    """Two products forward and five back, each of half the square; two more where all is redone."""
    heads, size, layers, tokens = 32, 128, 32, 4096
    once = layers * tokens**2 * heads * size
    for checkpointing, products in ((False, 7), (True, 9)):
        found = plan(LLAMA, None, tokens, gradient_checkpointing=checkpointing)
        assert found.work.attention == products * once
    kept = LeMoConfig(retention=0.25, policy="recent", dense_finish=0)
    assert plan(LLAMA, kept, tokens).work.attention == pytest.approx(7 * once / 16, rel=0.01)
    selective = plan(LLAMA, LeMoConfig(retention=1.0, recompute="selective"), tokens)
    assert selective.work.attention == 7 * once  # its output is kept


def test_sinks_are_one_more_key_of_wider_heads():
    layers, tokens = 3, 512
    _, config, _ = tiny("gpt_oss", layers)
    size = config.head_dim + sink_attention.WIDER
    once = layers * (tokens + 1) ** 2 * config.num_attention_heads * size
    assert plan(config, None, tokens).work.attention == 7 * once


def test_what_leaves_for_the_host_is_counted():
    lemo = LeMoConfig(retention=0.5, recompute="full", offload_gib=100)
    found = plan(LLAMA, lemo, 65536)
    assert found.work.offloaded == found.pinned > 0
    slow = dataclasses.replace(H200, offloaded=1e8)
    assert step_seconds(found, slow) == pytest.approx(2 * found.pinned / 1e8)


def test_a_measured_step_is_as_long_as_predicted():
    """Recorded by constants that were fitted without steps of its model and length."""
    record, errors = recorded(), []
    for header, rows in measured():
        for row in rows:
            held_out = record[key_of(header, row)]["ms_held_out"]
            errors.append(abs(held_out / row["ms_median"] - 1))
    assert max(errors) < 0.35 and statistics.median(errors) < 0.03


def test_short_steps_are_the_hosts_but_for_graphs():
    lemo = LeMoConfig(retention=0.3, dense_finish=0)
    found = plan(LLAMA, lemo, 512)
    assert step_seconds(found, H200) == pytest.approx(1e-6 * HOST["LeMo"] * found.work.launches)
    graphs = plan(LLAMA, dataclasses.replace(lemo, cuda_graphs=True), 512)
    assert step_seconds(graphs, H200) < step_seconds(found, H200) / 2
    again = plan(LLAMA, dataclasses.replace(lemo, recompute="full"), 512)
    by_launch = step_seconds(again, H200) / again.work.launches
    assert by_launch == pytest.approx(1e-6 * HOST["recomputed layers"])


def test_longer_and_denser_takes_longer_and_so_do_slower_cards():
    def seconds(card="h200", tokens=32768, **lemo):
        config = LeMoConfig(dense_finish=0, **lemo)
        return step_seconds(plan(LLAMA, config, tokens), CARDS[card])

    assert seconds(tokens=16384) < seconds() < seconds(retention=0.5) < seconds(tokens=131072)
    assert seconds() < seconds("h100") < seconds("a100")
    assert seconds(recompute="mlp") > seconds()
    assert seconds(fp8=True) < seconds()


def test_cards():
    assert card_of("NVIDIA H200") is H200 and card_of("NVIDIA H100 PCIe") is None
    assert "fitted to steps that were measured on it" in H200.said
    for name in set(CARDS) - {"h200"}:
        assert "no step was measured on it" in CARDS[name].said
    eight = plan(LLAMA, LeMoConfig(fp8=True), 16384)
    with pytest.raises(ValueError, match="fp8=True: an NVIDIA A100 SXM 80 GB has no products"):
        step_seconds(eight, CARDS["a100"])


def test_the_command_says_times(lemo, tmp_path, monkeypatch):
    config = tiny()[1]
    config.save_pretrained(tmp_path)
    options = ("plan", "--model", tmp_path, "--tokens", 1024, "--batch-size", 2)
    code, out, err = lemo(*options, "--gpu", "h100", "--json")
    assert code == 0, err
    found, expected = json.loads(out), plan(config, None, 1024, batch_size=2)
    assert found["gpu"] == "NVIDIA H100 SXM"
    seconds = step_seconds(expected, CARDS["h100"])
    assert found["without"]["step_ms"] == pytest.approx(1e3 * seconds, abs=0.1)
    assert found["without"]["tokens_per_s"] == pytest.approx(2048 / seconds, abs=1)
    assert found["fused"]["peak"] == plan(config, None, 1024, batch_size=2, fused=True).peak
    code, out, _ = lemo(*options, "--gpu", "h100")
    assert code == 0 and "step, ms" in out and "no step was measured on it" in out
    monkeypatch.setattr("lemo_hf.cli.gpu.gpu_here", Gpu)  # there is none
    code, out, _ = lemo(*options)
    assert code == 0 and "step, ms" not in out and "measured on it" not in out
    assert "--gpu tpu: known are h200, h100, " in lemo(*options, "--gpu", "tpu")[2]
    refused = lemo(*options, "--gpu", "h200", "--load-in-4bit")
    assert "times of quantised weights are not predicted" in refused[2]


def test_the_rival_that_fuses_is_liger():
    """Peaks of its longest-row trials with a known length (`test_plan.py` has those of steps)."""
    content = json.loads((RESULTS / "nvidia-h200" / "bench_longest.json").read_text())
    planners = {
        offload: Planner(
            model_config("Llama-3 8B"),
            adapter_dtype="bfloat16",
            autocast=False,
            gradient_checkpointing=True,
            stock_offload=offload,
        )
        for offload in (False, True)
    }
    rows = [x for x in content["rows"] if x["provider"][:5] == "liger" and x["part"] == "verify"]
    assert len(rows) == 4
    for row in rows:
        found = planners["offload" in row["provider"]].plan(None, row["tokens"], fused=True)
        assert found.peak / GIB == pytest.approx(row["peak_gib"], rel=0.01)
    # 32 parts at least, as many rows each as a power of two has.
    assert part_rows(16384, 128256, 4096) == 512 and part_rows(16384, 32000, 4096) == 2048
