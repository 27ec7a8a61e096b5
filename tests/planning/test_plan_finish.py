"""The memory plan of both phases of a run, against every allocation of tiny steps; `lemo plan`."""

import dataclasses
import json

import pytest
from support.allocations import LLAMA, peak_of_a_step, tiny
from support.plans import fitting_finish, longest, plan, plans
from support.trainers import dataset, make_trainer

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.memory.offload import GIB
from lemo_hf.planning.dry_step import workspaces
from lemo_hf.planning.plan import Planner

FULL = {"recompute": "full"}


@pytest.mark.parametrize("share", [1.0, 0.75])
@pytest.mark.parametrize(
    "options",
    [
        {"retention": 0.25},
        {"retention": 0.25, "recompute": "selective"},
        {"retention": 0.25, "mlp_retention": 0.5, "supervise": "all"},
        {"threshold": 1.0, "dense_first_layers": 1},
    ],
    ids=str,
)
def test_every_allocation_of_a_step_of_the_finish(options, share, launched):
    model, config, _ = tiny()
    policy = "pooled" if "threshold" in options else "recent"
    how = LeMoConfig(
        policy=policy, block_size=16, dense_finish=0.5, finish_retention=share, **options
    )
    apply_lemo(model, how).begin_step(1, 2)
    parameters = list(model.parameters())
    peak = peak_of_a_step(model)
    expected = plan(config, how, 512, adapter_dtype="bfloat16", autocast=False, finish=True)
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    before = sum(p.nbytes for p in parameters) + 2 * trained + workspaces(9)
    assert expected.peak - before == pytest.approx(peak, rel=0.015)


def test_the_finish_is_that_of_its_retention():
    """And a dense one that of retention 1, whatever else the config says."""
    lemo = LeMoConfig(retention=0.3, mlp_retention=0.2, policy="recent", dense_finish=0.25)
    for share in (1.0, 0.6):
        found = plan(LLAMA, dataclasses.replace(lemo, finish_retention=share), 16384, finish=True)
        same = dataclasses.replace(lemo, retention=share, mlp_retention=share)
        assert found == plan(LLAMA, same, 16384)
    with pytest.raises(ValueError, match="the stock model has no finish"):
        plan(LLAMA, None, 1024, finish=True)


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({}, ["sparse", "finish"]),
        ({"dense_finish": 0}, ["sparse"]),
        ({"dense_finish": 0.2}, ["sparse", "finish"]),
        ({"dense_finish": 1}, ["finish"]),
        ({"policy": "recent"}, ["sparse"]),
        ({"policy": "recent", "dense_finish": 0.2}, ["sparse", "finish"]),
        ({"threshold": 1.0, "dense_finish": 1}, ["finish"]),
    ],
)
def test_which_phases_a_run_has(options, phases):
    lemo = LeMoConfig(**options)
    found = plans(LLAMA, lemo, 4096)
    assert list(found) == phases
    for name, phase in found.items():
        assert phase == plan(LLAMA, lemo, 4096, finish=name == "finish")


def test_free_memory_chooses_the_level_of_each_phase():
    """In the finish optimizer states are there, and more rows are stored."""
    lemo = LeMoConfig(dense_first_layers=4)
    settings = {"gradient_checkpointing": True}
    roomy = plans(LLAMA, lemo, 65536, memory_gib=50, **settings)
    assert roomy["sparse"].levels == ("selective",) * 32
    assert roomy["finish"].levels == ("full",) * 32
    # All parameters: two states of 12.55 GiB each, which the first step does not see.
    one = LeMoConfig(dense_finish=1, retention=0.3)
    several = dataclasses.replace(one, dense_finish=0.5)
    first, later = (
        plan(LLAMA, how, 8192, lora_rank=None, memory_gib=70, finish=True, **settings).levels[0]
        for how in (one, several)
    )
    assert (first, later) == ("selective", "full")


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
def test_the_longest_row_is_that_of_the_phase_at_the_peak(share):
    lemo = LeMoConfig(retention=0.3, finish_retention=share, **FULL)
    tokens = longest(LLAMA, lemo, 24)
    found = plans(LLAMA, lemo, tokens)
    peak = "finish" if share > 0.3 else "sparse"
    assert max(found, key=lambda name: found[name].peak) == peak
    assert all(phase.fits(24) for phase in found.values())
    assert not plan(LLAMA, lemo, tokens + 64, finish=peak == "finish").fits(24)


@pytest.mark.parametrize(("share", "copies"), [(0.3, False), (0.1, False), (0.05, True)])
def test_the_finish_has_copies_in_fp8_if_it_begins_in_fp8(share, copies):
    eight = plans(LLAMA, LeMoConfig(fp8=True, bf16_finish=share), 4096)
    without = plans(LLAMA, LeMoConfig(), 4096)
    assert eight["sparse"].peak > without["sparse"].peak
    assert (eight["finish"].peak > without["finish"].peak) == copies


def test_a_run_in_bf16_alone_has_no_copies_in_fp8():
    found = plans(LLAMA, LeMoConfig(fp8=True, bf16_finish=1), 4096)
    without = plans(LLAMA, LeMoConfig(), 4096)
    assert {name: phase.peak for name, phase in found.items()} == {
        name: phase.peak for name, phase in without.items()
    }


@pytest.mark.parametrize("labels", [64, 57, 56, 8])
def test_rows_with_a_label_in_each_block_have_a_finish(labels, tmp_path):
    """As in training."""
    config = LeMoConfig(retention=0.25, block_size=8, chunk_size=8)
    trainer = make_trainer(tmp_path, config, data=dataset(tokens=64, answers=labels))
    trainer.train()
    kept = [log.get("lemo/attention_retention") for log in trainer.state.log_history[:-1]]
    found = plans(LLAMA, LeMoConfig(), 512, labels=8 * labels)
    assert ("finish" in found) == (kept[0] < kept[-1]) == (labels >= 57)


def test_the_longest_row_of_a_finish_in_bf16(lemo, tmp_path):
    """It has no copies in FP8, unless it begins before the bf16 steps."""
    LLAMA.save_pretrained(tmp_path)
    found = []
    for how in ({}, {"fp8": True}, {"fp8": True, "bf16_finish": 0.05}):
        LeMoConfig(**FULL, **how).save_pretrained(tmp_path)
        options = ("--config", tmp_path, "--memory-gib", 30, "--gradient-checkpointing", "--json")
        code, out, err = lemo("plan", "--model", tmp_path, "--tokens", 1024, *options)
        assert code == 0, err
        found.append(json.loads(out)["finish"]["longest"])
    assert found[0] == found[1] > found[2] > 0
    code, out, _ = lemo("plan", "--model", tmp_path, "--tokens", 1024, "--config", tmp_path)
    assert code == 0 and "in FP8, in bf16 in the last 5% of the steps." in out


def test_the_finish_that_fits():
    lemo = LeMoConfig(retention=0.3, **FULL)
    alone = longest(LLAMA, dataclasses.replace(lemo, dense_finish=0), 24)
    share = fitting_finish(LLAMA, lemo, alone, 26, reserve_gib=2)
    assert 0.3 <= share < 1
    for off, fits in ((0, True), (0.01, False)):
        how = dataclasses.replace(lemo, finish_retention=share + off)
        assert plan(LLAMA, how, alone, memory_gib=24, finish=True).fits(24) == fits
    assert fitting_finish(LLAMA, lemo, 1024, 24) == 1.0
    assert fitting_finish(LLAMA, lemo, 1024, 5) is None
    # No lower than the retention, whose steps fit where this finish does.
    peaks = [plan(LLAMA, lemo, 8192, finish=finish).peak / GIB for finish in (False, True)]
    assert 0.3 <= fitting_finish(LLAMA, lemo, 8192, sum(peaks) / 2) < 1
    assert fitting_finish(LLAMA, lemo, 8192, peaks[0] - 0.1) is None


def test_the_command_line_says_which_attention_has_sinks(lemo, tmp_path):
    config = tiny("gpt_oss")[1]
    config.save_pretrained(tmp_path)
    command = ("plan", "--model", tmp_path, "--tokens", 1024)
    code, out, err = lemo(*command, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["attention"] == "lemo_sinks"
    assert result["without"]["peak"] == plan(config, None, 1024).peak > result["LeMo"]["peak"]
    said = "All columns have attn_implementation='lemo_sinks', which LeMo brings; with 'eager', "
    assert said in lemo(*command)[1]


def test_the_command_line(lemo, tmp_path):
    LLAMA.save_pretrained(tmp_path)
    command = ("plan", "--model", tmp_path, "--recompute", "full", "--retention", 0.3)
    how = LeMoConfig(retention=0.3, **FULL)
    tokens = longest(LLAMA, dataclasses.replace(how, dense_finish=0), 22)
    card = ("--tokens", tokens, "--memory-gib", 24)
    code, out, err = lemo(*command, *card, "--json")
    assert code == 0, err
    result, found = json.loads(out), plans(LLAMA, how, tokens)
    assert result["LeMo"]["peak"] == found["sparse"].peak and result["LeMo"]["fits"]
    assert result["finish"]["peak"] == found["finish"].peak and not result["finish"]["fits"]
    assert result["LeMo"]["longest"] == tokens
    both = longest(LLAMA, how, 22)
    assert result["finish"]["longest"] == both
    share = fitting_finish(LLAMA, how, tokens, 22)
    assert result["fitting_finish"] == share
    code, out, _ = lemo(*command, *card)
    peaks = [found[name].peak / GIB for name in ("finish", "sparse")]
    assert "The last 10% of the steps are dense for rows that are labelled throughout." in out
    assert (
        f"The finish sets the peak, {peaks[0]:.2f} GiB; the sparse steps take {peaks[1]:.2f}"
        in (out)
    )
    assert f"Both fit with rows of up to {both:,} tokens." in out
    assert f"With --finish-retention {share:g} the finish fits rows of {tokens:,} as well." in out
    assert (
        "Rows whose labels cover a part of them have none: give the number of labels as --labels."
        in out
    )
    code, out, _ = lemo(*command, *card, "--dense-finish", 0.2, "--finish-retention", share)
    assert f"The last 20% of the steps keep {share:.0%} of the blocks." in out
    assert "as well" not in out and "have no finish" not in out
    code, out, _ = lemo(*command, "--tokens", tokens, "--dense-finish", 0)
    assert code == 0 and "finish" not in out
    code, out, _ = lemo(*command, "--tokens", tokens, "--dense-finish", 1)
    assert "The last 100% of the steps are dense. There are no other steps." in out
    code, out, _ = lemo(*command, "--dense-finish", 0.2, "--finish-retention", 0.3)
    assert "The sparse steps set the peak" in out and "Both fit" not in out
    code, _, err = lemo(*command, "--dense-finish", 2)
    assert code == 2 and "dense_finish must lie in [0, 1]" in err


def test_layers_that_fit_store_everything():
    """The last ones, as many as fit both phases; and nobody is asked where none does."""
    planner = Planner(LLAMA, gradient_checkpointing=True)
    lemo = LeMoConfig(retention=0.25, policy="recent", dense_finish=0.5, finish_retention=0.5)
    layers = LLAMA.num_hidden_layers

    def peak(stored):
        levels = ("selective",) * (layers - stored) + ("none",) * stored
        found = planner.plans(dataclasses.replace(lemo, recompute=levels), 16384, None)
        return max(phase.peak for phase in found.values())

    room = (peak(0) + peak(layers)) // 2
    spared = planner.spared(lemo, 16384, room)
    stored = spared.recompute.count("none")
    assert spared.recompute == ("selective",) * (layers - stored) + ("none",) * stored
    assert peak(stored) <= room < peak(stored + 1) and 0 < stored < layers
    assert dataclasses.replace(spared, recompute=None) == lemo
    assert planner.spared(lemo, 16384, peak(layers)).recompute == ("none",) * layers
    assert planner.spared(lemo, 16384, peak(1) - 1) is None
