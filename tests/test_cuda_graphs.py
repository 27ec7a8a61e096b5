"""Passes by CUDA graphs: the numbers of passes without, and which batches can have one."""

import gc
import logging
import os
import warnings
from dataclasses import replace

import pytest
import torch
from hub_client import make_predictor
from models import batch, make_model, with_lora
from test_trainer import SPARSE, losses, make_trainer

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.cuda_graphs import MOST_GRAPHS

STEPS = 5  # as ever, recorded, replayed thrice


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
    with pytest.raises(ValueError, match="mlp_retention=0.5 it is known only at the end"):
        LeMoConfig(cuda_graphs=True, mlp_retention=0.5)
    with pytest.raises(ValueError, match="cuda_graphs must be one of .* got 1"):
        LeMoConfig(cuda_graphs=1)


def test_on_a_cpu_passes_run_as_ever(tmp_path, caplog):
    expected = losses(make_trainer(tmp_path, SPARSE))
    with caplog.at_level(logging.WARNING, "lemo_hf.cuda_graphs"):
        assert losses(make_trainer(tmp_path, replace(SPARSE, cuda_graphs=True))) == expected
    assert [record.getMessage() for record in caplog.records] == [
        "cuda_graphs: a batch ran without one, since it needs input_ids on a GPU. Said once."
    ]


def graphs_of(model):
    """How many graphs there are for ``model``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return len(vars(base)["_call_impl"].__func__.args[1]._graphs)


def batches(tokens=70, rows=2, steps=STEPS):
    torch.manual_seed(3)
    ids = torch.randint(3, 97, (steps, rows, tokens)).cuda()
    return [{"input_ids": x, "labels": x} for x in ids]


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
        kept = {key: blocks.clone() for key, blocks in lemo.passes.kept_blocks.items()}
        found.append((loss.item(), grads, kept))
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


def tiny(family="llama", lora=True, **options):
    model = make_model(family, "sdpa", **options)
    return (with_lora(model) if lora else model).cuda()


gpu = pytest.mark.gpu
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "opt", "phi3", "granite", "olmo2"]


@gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    assert_as_without(lambda: tiny(family), SPARSE, batches())


@gpu
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
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_setting(options, lora):
    config = LeMoConfig(block_size=8, segment_size=40, **options)
    assert_as_without(lambda: tiny(lora=lora), config, batches())


@gpu
def test_bf16_and_checkpointing():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}

    def make():
        model = tiny(num_attention_heads=4, **sizes).bfloat16()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    # Weights stay: cuDNN adds up gradients in any order, and two runs without graphs drift apart.
    config = LeMoConfig(block_size=64)
    assert_as_without(make, config, batches(tokens=2048, rows=1), rtol=1e-3, lr=0)


@gpu
def test_predictors():
    predictor = make_predictor().cuda()

    def run(flag):
        config = LeMoConfig(
            policy="predictor",
            block_size=8,
            agree_across_layers=False,
            supervise="all",
            cuda_graphs=flag,
        )
        model = tiny()
        apply_lemo(model, config, predictor)
        found = [model(**inputs).loss.item() for inputs in batches()]
        assert not flag or graphs_of(model) == 1
        return found

    assert run(True) == pytest.approx(run(False), rel=1e-5)


@gpu
def test_lengths_and_label_counts_have_graphs_of_their_own(caplog):
    """Rows without most labels too: how many there are fixes shapes."""
    inputs = [x for tokens in (70, 64, 48) for x in batches(tokens=tokens, steps=3)]
    few = [{**x, "labels": x["labels"].clone()} for x in batches(steps=3)]
    for x in few:
        x["labels"][:, :60] = -100
    # Lengths take turns.
    inputs = [x for i in range(3) for x in (inputs[i], inputs[3 + i], inputs[6 + i], few[i])]
    assert_as_without(tiny, SPARSE, inputs, graphs=4)
    many = [x for tokens in range(40, 50) for x in batches(tokens=tokens, steps=3)]
    with caplog.at_level(logging.WARNING, "lemo_hf.cuda_graphs"):
        assert_as_without(tiny, SPARSE, many, graphs=MOST_GRAPHS)
    assert [record.getMessage() for record in caplog.records] == [
        f"cuda_graphs: a batch ran without one, since {MOST_GRAPHS} shapes have one. Said once."
    ]


@gpu
@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"attention_mask": lambda x: (torch.arange(70) > 5).expand(2, -1).long()}, "padding"),
        ({"position_ids": lambda x: torch.arange(70).expand(2, -1) % 35}, "given position_ids"),
        ({"labels": lambda x: None}, "no labels"),
    ],
)
def test_batches_that_cannot_have_one_run_as_ever(extra, why, caplog):
    model = tiny()
    apply_lemo(model, replace(SPARSE, cuda_graphs=True))
    with caplog.at_level(logging.WARNING, "lemo_hf.cuda_graphs"):
        for inputs in batches():
            made = {name: make(inputs) for name, make in extra.items()}
            model(**inputs | {k: v if v is None else v.cuda() for k, v in made.items()})
    assert graphs_of(model) == 0 and len(caplog.records) == 1
    assert why in caplog.records[0].getMessage()


@gpu
def test_a_mask_of_ones_is_no_padding():
    ones = torch.ones(2, 70, dtype=torch.long, device="cuda")
    assert_as_without(tiny, SPARSE, [{**x, "attention_mask": ones} for x in batches()])


@gpu
def test_weights_that_moved_are_found():
    model, twin = tiny(), tiny()
    apply_lemo(model, replace(SPARSE, cuda_graphs=True))
    apply_lemo(twin, SPARSE)
    for step, inputs in enumerate(batches(steps=9)):
        if step == 4:
            for weight in model.parameters():
                weight.data = weight.data.clone()
        if step in (4, 6):
            for one in (model, twin):
                one.set_adapter("default")
                for name, weight in one.named_parameters():
                    if "q_proj.lora" in name:
                        weight.requires_grad_(step == 6)
        found, expected = model(**inputs).loss, twin(**inputs).loss
        found.backward(), expected.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@gpu
def test_two_losses_before_one_backward():
    model, twin = tiny(), tiny()
    apply_lemo(model, replace(SPARSE, cuda_graphs=True))
    apply_lemo(twin, SPARSE)
    inputs = batches()
    for one in (model, twin):
        for x in inputs[:2]:
            one(**x)
        (3 * one(**inputs[2]).loss + 0.5 * one(**inputs[3]).loss).backward()
    assert graphs_of(model) == 1
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@gpu
def test_dropout_is_drawn_anew():
    model = with_lora(make_model("llama", "sdpa"), lora_dropout=0.5).cuda()
    apply_lemo(model, LeMoConfig(block_size=8, cuda_graphs=True))
    (inputs,) = batches(steps=1)
    found = [model(**inputs).loss.item() for _ in range(6)]
    assert graphs_of(model) == 1 and len(set(found)) == 6


@gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_through_trainer(tmp_path, accumulation, dtype, caplog):
    options = {
        "use_cpu": False,
        "gradient_accumulation_steps": accumulation,
        "eval_dataset": [{"input_ids": x, "labels": x} for x in batch()["input_ids"]],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 6,
        "dataloader_num_workers": 1,
        dtype: True,
    }
    plain = make_trainer(tmp_path, SPARSE, model=tiny(), **options)
    expected = losses(plain)
    ours = make_trainer(tmp_path, replace(SPARSE, cuda_graphs=True), model=tiny(), **options)
    with caplog.at_level(logging.WARNING, "lemo_hf.cuda_graphs"):
        assert losses(ours) == pytest.approx(expected, rel=2e-2)
    assert graphs_of(ours.model) == (dtype == "bf16")
    assert bool(caplog.records) == (dtype == "fp16")
    for log, other in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert log.keys() == other.keys()
        assert log.get("lemo/attention_retention") == other.get("lemo/attention_retention")


@gpu
def test_eager_attention_runs_as_ever(tmp_path, caplog):
    trainer = make_trainer(tmp_path, replace(SPARSE, cuda_graphs=True), use_cpu=False)
    with caplog.at_level(logging.WARNING, "lemo_hf.cuda_graphs"):
        losses(trainer)
    assert graphs_of(trainer.model) == 0
    assert "take attn_implementation='sdpa'" in caplog.records[0].getMessage()


@gpu
def test_hooks_on_parameters_and_losses_that_live_on():
    model, twin = tiny(), tiny()
    apply_lemo(model, replace(SPARSE, cuda_graphs=True))
    apply_lemo(twin, SPARSE)
    calls = []
    for one in (model, twin):
        for name, weight in one.named_parameters():
            if "lora_A" in name:
                weight.register_hook(lambda grad: 2 * grad)
                weight.register_post_accumulate_grad_hook(lambda weight: calls.append(weight.shape))
    kept = []
    for inputs in batches():
        for one in (model, twin):
            kept.append(one(**inputs).loss)
            kept[-1].backward()
    assert graphs_of(model) == 1 and len(calls) == 2 * STEPS * sum(
        "lora_A" in name for name, _ in model.named_parameters()
    )
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@gpu
def test_a_forked_process_frees_nothing_of_its_parent():
    """A data loader's workers may collect what is left of an earlier model."""
    model = tiny()
    apply_lemo(model, replace(SPARSE, cuda_graphs=True))
    for inputs in batches():
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
def test_a_loss_outside_the_model_runs_as_ever(tmp_path, caplog):
    config = replace(SPARSE, cuda_graphs=True)
    trainer = make_trainer(tmp_path, config, use_cpu=False, label_smoothing_factor=0.1)
    with caplog.at_level(logging.WARNING, "lemo_hf.cuda_graphs"):
        losses(trainer)
    assert "no labels" in caplog.records[0].getMessage()


@gpu
def test_the_host_waits_for_counts_alone():
    model = tiny()
    apply_lemo(model, LeMoConfig(block_size=8, cuda_graphs=True))
    inputs = batches()
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


@gpu
@pytest.mark.parametrize(
    ("hook", "why"), [(reads_the_device, "captur"), (holds_weights, "past the modules")]
)
def test_a_pass_that_cannot_be_recorded_says_so(hook, why):
    model = tiny()
    layer = model.get_base_model().model.layers[1]
    layer.mlp.register_forward_hook(hook(model))
    apply_lemo(model, LeMoConfig(block_size=8, cuda_graphs=True))
    inputs = batches()
    model(**inputs[0])
    match = rf"cannot become a CUDA graph(.|\n)*{why}(.|\n)*cuda_graphs=False"
    with pytest.raises(RuntimeError, match=match):
        model(**inputs[1])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    remove_lemo(model)
    apply_lemo(model, LeMoConfig(block_size=8))
    model(**inputs[1]).loss.backward()  # the device still works
