"""Passes by CUDA graphs: the numbers of passes without, and which batches can have one.

On a CPU a pass is run again where a GPU replays it (`eager_graphs`); all else is the same.
"""

import copy
import gc
import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from support.graph_cases import (
    STEPS,
    assert_same_gradients,
    batches,
    gpu,
    graphs_of,
    tiny,
    with_twin,
)
from support.hub_client import make_predictor
from support.models import batch, make_model, with_lora
from support.paths import ROOT
from support.trainers import SPARSE, losses, make_trainer

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.batch import row_counts
from lemo_hf.graphs.cuda_graphs import MOST_GRAPHS
from lemo_hf.report.callback import ReportCallback

GRAPHS = replace(SPARSE, cuda_graphs=True)
FAMILIES = ["llama", "qwen3", "gemma3_text", "opt", "phi3", "granite", "olmo2"]


@pytest.fixture
def warned(caplog):
    """What is warned of."""
    caplog.set_level(logging.WARNING, "lemo_hf.graphs.cuda_graphs")
    name = "lemo_hf.graphs.cuda_graphs"
    return lambda: [r.getMessage() for r in caplog.records if r.name == name]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", 1.0),
        ("mlp_threshold", 1.0),
        ("offload_gib", 1),
        ("sequence_parallel_size", 2),
    ],
)
def test_what_the_host_must_act_for_is_refused(field, value):
    with pytest.raises(ValueError, match=f"cuda_graphs=True and {field}={value} cannot be"):
        LeMoConfig(cuda_graphs=True, **{field: value})
    with pytest.raises(ValueError, match="need one kept set: with agree_across_layers=False"):
        LeMoConfig(cuda_graphs=True, agree_across_layers=False)
    with pytest.raises(ValueError, match="mlp_retention=0.5 only the end of a pass"):
        LeMoConfig(cuda_graphs=True, mlp_retention=0.5)
    with pytest.raises(ValueError, match="cuda_graphs must be one of .* got 1"):
        LeMoConfig(cuda_graphs=1)


def test_without_a_gpu_passes_run_as_ever(tmp_path, warned):
    expected = losses(make_trainer(tmp_path, SPARSE))
    assert losses(make_trainer(tmp_path, GRAPHS)) == expected
    assert warned() == [
        "cuda_graphs: a batch ran without one, since it needs input_ids on a GPU. "
        "This is said once."
    ]


def trained(model, config, inputs, lr):
    """Loss and gradients of each step, and what was kept; weights move by ``lr`` between steps."""
    lemo = apply_lemo(model, config)
    found = []
    for step, kwargs in enumerate(inputs):
        lemo.passes.global_step = step
        model.zero_grad()
        loss = model(**kwargs).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(lr * p.grad)
        found.append((loss.item(), grads, lemo.passes.tally.kept_blocks))
    report, count = lemo.report(), graphs_of(model) if config.cuda_graphs else 0
    remove_lemo(model)
    return found, report, count


def assert_as_without(make, config, inputs, rtol=1e-4, graphs=1, lr=0.05):
    plain, report, _ = trained(make(), config, inputs, lr)
    ours, ours_report, count = trained(make(), replace(config, cuda_graphs=True), inputs, lr)
    assert count == graphs and ours_report == report
    for (loss, grads, kept), (other, other_grads, other_kept) in zip(plain, ours, strict=True):
        assert other == pytest.approx(loss, rel=rtol)
        assert other_kept.keys() == kept.keys()
        assert all(torch.equal(other_kept[key], kept[key]) for key in kept)
        assert other_grads.keys() == grads.keys()
        for name, grad in grads.items():
            error = (other_grads[name].double() - grad.double()).norm()
            assert error <= 20 * rtol * grad.double().norm() + 1e-9, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(device, family):
    assert_as_without(lambda: tiny(device, family), SPARSE, batches(device))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "recent", "dense_first_layers": 1},
        {"policy": "pooled"},
        {"policy": "oracle", "agree_across_layers": False, "supervise": "all"},
        {"policy": "window", "mlp_retention": 0.4, "supervise": "all"},
        {"policy": "random", "supervise": "all"},
        {"policy": "random", "recompute": "mlp"},
        {"policy": "random", "recompute": "selective"},
        {"policy": "random", "recompute": "full"},
        {"policy": "recent", "retention": 1.0},
        {"policy": "auto", "retention": 0.3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_setting(device, options, lora):
    config = LeMoConfig(**{"retention": 0.5, "block_size": 8, "segment_size": 40, **options})
    assert_as_without(lambda: tiny(device, lora=lora), config, batches(device))


@pytest.mark.parametrize("policy", ["auto", "overlap", "pooled"])
def test_rows_of_which_a_part_is_labelled(device, policy):
    """What is chosen for the labels is chosen inside the graph."""
    inputs = [{**x, "labels": x["labels"].clone()} for x in batches(device)]
    for x in inputs:
        x["labels"][:, :60] = -100
    config = LeMoConfig(policy=policy, retention=0.4, block_size=8, segment_size=40)
    assert_as_without(lambda: tiny(device), config, inputs)


@pytest.mark.parametrize(
    ("policy", "supervise"),
    [("auto", "kept"), ("overlap", "all"), ("pooled", "kept"), ("oracle", "all")],
)
def test_answers_of_different_lengths_share_a_graph(device, policy, supervise, monkeypatch):
    """As long as their blocks are no more than the budget; each length beyond has its own."""
    monkeypatch.setattr(row_counts, "LABELS", 64)
    config = LeMoConfig(
        policy=policy, retention=0.5, block_size=8, segment_size=40, supervise=supervise
    )
    inputs = [{**x, "labels": x["labels"].clone()} for x in batches(device, tokens=150, steps=7)]
    for step, x in enumerate(inputs):
        for row in range(2):
            x["labels"][row, : 140 - 13 * step + 5 * row] = -100
            x["labels"][row, 148 - step :] = -100
    assert len({int((x["labels"] != -100).sum()) for x in inputs}) == len(inputs)
    within = 5  # 10 of 19 blocks may be kept
    assert_as_without(lambda: tiny(device), config, inputs[:within], graphs=1)
    beyond = [x for x in inputs[within + 1 :] for _ in range(2)]
    assert_as_without(lambda: tiny(device), config, [*inputs[:within], *beyond], graphs=2)


def test_bf16_and_checkpointing(device):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}

    def make():
        model = tiny(device, num_attention_heads=4, **sizes).bfloat16()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    # Weights stay: cuDNN adds up gradients in any order, and two runs without graphs drift apart.
    config = LeMoConfig(policy="recent", retention=0.5, block_size=64)
    assert_as_without(make, config, batches(device, tokens=2048, rows=1), rtol=1e-3, lr=0)


def test_predictors(device):
    predictor = make_predictor().to(device)

    def run(flag):
        config = LeMoConfig(
            policy="predictor",
            block_size=8,
            agree_across_layers=False,
            supervise="all",
            cuda_graphs=flag,
        )
        model = tiny(device)
        apply_lemo(model, config, predictor)
        found = [model(**inputs).loss.item() for inputs in batches(device)]
        assert not flag or graphs_of(model) == 1
        return found

    assert run(True) == pytest.approx(run(False), rel=1e-5)


def test_lengths_and_label_counts_have_graphs_of_their_own(device, warned):
    """Rows without most labels too: how many there are fixes shapes."""
    inputs = [x for tokens in (70, 64, 48) for x in batches(device, tokens=tokens, steps=3)]
    few = [{**x, "labels": x["labels"].clone()} for x in batches(device, steps=3)]
    for x in few:
        x["labels"][:, :60] = -100
    # Lengths take turns.
    inputs = [x for i in range(3) for x in (inputs[i], inputs[3 + i], inputs[6 + i], few[i])]
    assert_as_without(lambda: tiny(device), SPARSE, inputs, graphs=4)
    many = [x for tokens in range(40, 50) for x in batches(device, tokens=tokens, steps=3)]
    assert_as_without(lambda: tiny(device), SPARSE, many, graphs=MOST_GRAPHS)
    assert warned() == [
        f"cuda_graphs: a batch ran without one, since {MOST_GRAPHS} shapes have one. "
        "This is said once."
    ]


def test_a_mask_of_ones_is_no_padding(device):
    ones = torch.ones(2, 70, dtype=torch.long, device=device)
    inputs = [{**x, "attention_mask": ones} for x in batches(device)]
    assert_as_without(lambda: tiny(device), SPARSE, inputs)


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"attention_mask": lambda x: (torch.arange(70) > 5).expand(2, -1).long()}, "padding"),
        ({"position_ids": lambda x: torch.arange(70).expand(2, -1) % 35}, "given position_ids"),
        ({"labels": lambda x: None}, "no labels"),
    ],
)
def test_batches_that_cannot_have_one_run_as_ever(device, extra, why, warned):
    model = tiny(device)
    apply_lemo(model, GRAPHS)
    for inputs in batches(device):
        made = {name: make(inputs) for name, make in extra.items()}
        model(**inputs | {k: v if v is None else v.to(device) for k, v in made.items()})
    (message,) = warned()
    assert graphs_of(model) == 0 and why in message


def eager(model):
    return with_lora(make_model("llama", "eager"))


def dynamic_rope(model):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return with_lora(make_model("llama", "sdpa", rope_parameters=rope))


def eight_bits(model):
    model.get_base_model().is_loaded_in_8bit = True
    return model


def module_dropout(model):
    options = {"target_modules": ["q_proj"], "module_dropout": 0.5}
    return get_peft_model(make_model("llama", "sdpa"), LoHaConfig(**options))


def router_jitter(model):
    model = make_model("mixtral", "sdpa", router_jitter_noise=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def frozen(model):
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (eager, "eager attention asks the host; take attn_implementation='sdpa'"),
        (dynamic_rope, "the host picks the frequencies"),
        (eight_bits, "outliers of 8-bit weights"),
        (module_dropout, "which of PEFT's modules are dropped"),
        (router_jitter, "dropout must be drawn again"),
        (frozen, "no weight is trained"),
    ],
)
def test_models_that_cannot_have_one_run_as_ever(device, make, why, warned):
    model = make(tiny(device)).to(device).train()
    apply_lemo(model, GRAPHS)
    for inputs in batches(device):
        model(**inputs)
    (message,) = warned()
    assert graphs_of(model) == 0 and why in message


def test_a_copy_of_the_model_is_on_its_own(device, warned):
    model = tiny(device)
    lemo = apply_lemo(model, GRAPHS)
    inputs = batches(device)
    for x in inputs[:3]:
        model(**x).loss.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1.1)
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    loss = twin(**inputs[3]).loss
    loss.backward()
    assert loss.item() != model(**inputs[3]).loss.item()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    same = zip((p.grad for p in model.parameters() if p.requires_grad), gradients, strict=True)
    assert all(torch.equal(x, y) for x, y in same)
    assert lemo.passes.tally.counts["real"] == 4 * inputs[3]["input_ids"].numel()
    assert ["copy of the model" in message for message in warned()] == [True]


def test_two_losses_before_one_backward(device):
    model, twin = with_twin(device)
    inputs = batches(device)
    for one in (model, twin):
        for x in inputs[:2]:
            one(**x)
        (3 * one(**inputs[2]).loss + 0.5 * one(**inputs[3]).loss).backward()
    assert graphs_of(model) == 1
    assert_same_gradients(model, twin)
    loss = model(**inputs[4]).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_hooks_on_parameters_and_losses_that_live_on(device):
    model, twin = with_twin(device)
    calls = []
    for one in (model, twin):
        for name, weight in one.named_parameters():
            if "lora_A" in name:
                weight.register_hook(lambda grad: 2 * grad)
                weight.register_post_accumulate_grad_hook(lambda weight: calls.append(weight.shape))
    kept = []
    for inputs in batches(device):
        for one in (model, twin):
            kept.append(one(**inputs).loss)
            kept[-1].backward()
    assert graphs_of(model) == 1 and len(calls) == 2 * STEPS * sum(
        "lora_A" in name for name, _ in model.named_parameters()
    )
    assert_same_gradients(model, twin)


def test_outputs_as_a_tuple(device):
    model, twin = with_twin(device)
    found = [model(**x, return_dict=False) for x in batches(device)]
    expected = [twin(**x, return_dict=False) for x in batches(device)]
    assert graphs_of(model) == 0  # its logits carry gradients
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[:2], other[:2], rtol=1e-4, atol=1e-5)


def test_dropout_is_drawn_anew(device):
    model = with_lora(make_model("llama", "sdpa"), lora_dropout=0.5).to(device)
    apply_lemo(model, LeMoConfig(block_size=8, cuda_graphs=True))
    (inputs,) = batches(device, steps=1)
    found = [model(**inputs).loss.item() for _ in range(6)]
    assert graphs_of(model) == 1 and len(set(found)) == 6


@pytest.mark.parametrize(("accumulation", "lora"), [(1, True), (2, False)])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", "bf16"), *(pytest.param("cuda", dtype, marks=gpu) for dtype in ("bf16", "fp16"))],
    indirect=["device"],
)
def test_through_trainer(device, tmp_path, accumulation, dtype, lora, warned):
    options = {
        "use_cpu": device == "cpu",
        "gradient_accumulation_steps": accumulation,
        "eval_dataset": [{"input_ids": x, "labels": x} for x in batch()["input_ids"]],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 6,
        "dataloader_num_workers": 1,
        dtype: True,
    }
    trainers, found, pages = [], [], []
    for config in (SPARSE, GRAPHS):
        trainer = make_trainer(
            tmp_path,
            config,
            model=tiny(device, lora=lora),
            callbacks=[ReportCallback()],
            **options,
        )
        found.append(losses(trainer))
        trainers.append(trainer)
        pages.append(json.loads((tmp_path / "lemo_report.json").read_text())["rows"])
    assert found[1] == pytest.approx(found[0], rel=2e-2)
    plain, ours = trainers
    assert graphs_of(ours.model) == (dtype == "bf16")
    assert ["float16" in message for message in warned()] == [True] * (dtype == "fp16")
    for log, other in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert log.keys() == other.keys()
        assert log.get("lemo/attention_retention") == other.get("lemo/attention_retention")
    for row, other in zip(*pages, strict=True):
        for name in ("attention", "mlp"):
            assert row[name] == other[name], name


def test_a_loss_outside_the_model_runs_as_ever(device, tmp_path, warned):
    trainer = make_trainer(
        tmp_path,
        GRAPHS,
        model=tiny(device),
        use_cpu=device == "cpu",
        label_smoothing_factor=0.1,
    )
    losses(trainer)
    (message,) = warned()
    assert graphs_of(trainer.model) == 0 and "the loss is not the model's own" in message


def test_a_forked_process_collects_nothing_of_its_parent():
    code = """
import gc, os
from support.models import make_model
from lemo_hf import LeMoConfig, apply_lemo
apply_lemo(make_model("llama"), LeMoConfig(block_size=8))
left = []
left.append(left)
gc.disable()
del left
child = os.fork()
if child == 0:
    os._exit(bool(gc.collect()))
assert gc.collect() and os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True, timeout=120)


@gpu
def test_a_forked_process_frees_nothing_of_its_parent():
    """A data loader's workers may collect what is left of an earlier model."""
    model = tiny("cuda")
    apply_lemo(model, GRAPHS)
    for inputs in batches("cuda"):
        model(**inputs).loss.backward()
    assert graphs_of(model) == 1
    pinned = [torch.empty(8, pin_memory=True).copy_(torch.empty(8, device="cuda"))]
    pinned.append(pinned)
    gc.collect()
    gc.disable()
    del model, pinned  # a module and its hooks are a cycle, so that it stays where it is
    child = os.fork()
    if child == 0:
        gc.collect()
        os._exit(0)
    gc.enable()
    assert os.waitpid(child, 0)[1] == 0


@gpu
def test_the_host_waits_for_counts_alone():
    model = tiny("cuda")
    apply_lemo(model, LeMoConfig(block_size=8, cuda_graphs=True))
    inputs = batches("cuda")
    for x in inputs[:2]:
        model(**x).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in inputs[2:]:
            model(**x).loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert not [w for w in caught if "synchroniz" in str(w.message)]


def reads_the_device(model):
    return lambda *args: print(float(args[2].sum()))


def holds_weights(model):
    held = [p for p in model.parameters() if p.requires_grad]
    return lambda *args: args[2] + sum(p.sum() for p in held)


def assert_memory_goes_back():
    """As it does not while a graph is recorded."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    held = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    other = torch.cuda.Stream()
    held.record_stream(other)  # its memory waits for what the other stream does
    assert torch.cuda.memory_reserved() >= before + 2**26
    del held
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.parametrize(
    ("device", "hook", "why"),
    [
        ("cpu", holds_weights, "without calling the modules"),
        pytest.param("cuda", holds_weights, "without calling the modules", marks=gpu),
        pytest.param("cuda", reads_the_device, "captur", marks=gpu),
    ],
    indirect=["device"],
)
def test_a_pass_that_cannot_be_recorded_says_so(device, hook, why):
    model = tiny(device)
    layer = model.get_base_model().model.layers[1]
    layer.mlp.register_forward_hook(hook(model))
    apply_lemo(model, LeMoConfig(block_size=8, cuda_graphs=True))
    inputs = batches(device)
    model(**inputs[0])
    match = rf"cannot become a CUDA graph(.|\n)*{why}(.|\n)*cuda_graphs=False"
    before = torch.cuda.get_rng_state() if device == "cuda" else None
    with pytest.raises(RuntimeError, match=match):
        model(**inputs[1])
    if device == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert torch.equal(torch.cuda.get_rng_state(), before)
        assert torch.rand(8, device=device).unique().numel() == 8
        assert_memory_goes_back()
    remove_lemo(model)
    apply_lemo(model, LeMoConfig(block_size=8))
    model(**inputs[1]).loss.backward()  # the device still works


def test_a_number_of_items_that_is_not_whole(device):
    """A mean over processes need not be; the graph was recorded with a whole one."""
    model = tiny(device)
    apply_lemo(model, replace(GRAPHS, policy="recent"))
    (inputs,) = batches(device, steps=1)
    sums = [n * model(**inputs, num_items_in_batch=n).loss.item() for n in (2, 2, 2, 2.5)]
    assert graphs_of(model) == 1
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-6)
