"""Levels of recomputation: what runs again, what does not, and that nothing changes by it."""

import gc

import pytest
import torch
from support.grids import covering
from support.models import batch, make_model, with_lora
from support.passes import assert_same, run
from torch.utils._python_dispatch import TorchDispatchMode

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.config import LEVELS, UNITS
from lemo_hf.memory import offload
from lemo_hf.memory import recompute as levels


@pytest.fixture
def model():
    return with_lora(make_model("llama", "sdpa"))


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("granite", {}),
        ("qwen3_moe", {}),
        ("opt", {}),
        ("opt", {"do_layer_norm_before": False}),
    ],
)
def test_full_fine_tuning_is_the_same_at_every_level(family, overrides, level):
    """Weights of norms, experts and projections get their gradients through tiles too."""
    model = make_model(family, "sdpa" if family != "gemma2" else "eager", **overrides)
    assert_same(run(model, recompute=level), run(model, recompute="none"))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_tiles_change_nothing(model, level, monkeypatch):
    whole = run(model, recompute=level)
    monkeypatch.setattr(levels, "TILE_BYTES", 1)
    monkeypatch.setattr(levels, "LEAST_ROWS", 10)  # 96 kept rows: the last tile is a short one
    assert levels.tile_rows(torch.empty(2, 48, 32), 48) == 10
    assert_same(run(model, recompute=level), whole)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_dropout_drops_the_same_when_run_again(level):
    model = with_lora(make_model("phi3", "sdpa", resid_pdrop=0.3), lora_dropout=0.2)
    assert_same(run(model, recompute=level), run(model, recompute="none"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["up_proj"]},
        {"target_modules": ["down_proj", "o_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [2, 3]},
    ],
)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_adapters_on_some_linears(options, level):
    model = with_lora(make_model("llama", "sdpa"), **options)
    assert_same(run(model, recompute=level), run(model, recompute="none"))


@pytest.mark.parametrize("third", ["selective", "lean"])
def test_levels_of_their_own(model, third):
    mixed = ("none", "mlp", third, "full")
    expected = run(model, recompute="none")
    calls = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        for name, module in (("q", layer.self_attn.q_proj), ("gate", layer.mlp.gate_proj)):
            module.register_forward_hook(lambda *_, what=(index, name): calls.append(what))
    assert_same(run(model, recompute=mixed), expected)
    times = [[calls.count((index, name)) for name in ("q", "gate")] for index in range(4)]
    assert times == [[1, 1], [1, 2], [2, 2], [2, 2]]


@pytest.mark.parametrize(
    ("level", "projections", "attentions", "outputs"),
    [
        ("none", 1, 1, 1),
        ("mlp", 1, 1, 1),
        ("selective", 2, 1, 1),
        ("lean", 2, 1, 2),
        ("full", 2, 2, 2),
    ],
)
def test_what_runs_again(model, level, projections, attentions, outputs):
    """Attention runs again at "full" alone; the MLP never more than twice, nor its last product."""
    layer = model.get_base_model().model.layers[1]
    calls = {"q": 0, "gate": 0, "attention": 0, "down": 0, "output": 0}
    layer.mlp.down_proj = torch.nn.Linear(48, 32, bias=False).requires_grad_(False)
    output = layer.self_attn.o_proj
    weights = {"down": layer.mlp.down_proj.weight, "output": output.base_layer.weight}

    class Attention(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            products = ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul")
            for what, weight in weights.items():
                # A transpose is a view: forward products read it, the gradient's read the weight.
                calls[what] += name in products and any(
                    torch.is_tensor(x)
                    and x.data_ptr() == weight.data_ptr()
                    and x.stride() == weight.mT.stride()
                    for x in args
                )
            calls["attention"] += "scaled_dot_product" in name and "backward" not in name
            return func(*args, **(kwargs or {}))

    layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.__setitem__("q", calls["q"] + 1))
    layer.mlp.gate_proj.register_forward_hook(
        lambda *_: calls.__setitem__("gate", calls["gate"] + 1)
    )
    with Attention():
        run(model, recompute=level)
    assert calls["q"] == projections
    assert calls["gate"] == (1 if level == "none" else 2)
    assert calls["down"] == 1
    assert calls["output"] == outputs
    assert calls["attention"] == 4 * attentions


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("lora", [False, True])
def test_nobody_reads_what_is_not_computed(level, lora):
    """Memory that nobody writes holds NaN here, and losses and gradients hold none of it."""
    model = make_model("llama", "sdpa")
    model = with_lora(model) if lora else model
    expected = run(model, recompute=level)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        found = run(model, recompute=level)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


def test_gradient_checkpointing_picks_a_level(model, monkeypatch):
    """Where memory allows, and on a CPU it does, attention is not run again."""
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    real, picked = levels.checkpointed, []
    monkeypatch.setattr(
        "lemo_hf.core.layer.checkpointed",
        lambda function, rows, level, *rest: (
            picked.append(level) or real(function, rows, level, *rest)
        ),
    )
    run(model)
    assert picked == ["selective"] * 4
    run(model, recompute="full")
    assert picked[4:] == ["full"] * 4


@pytest.mark.parametrize(
    ("fails", "level", "offload_gib"),
    [
        *covering((False, True), LEVELS, (None,)),
        *((fails, level, 1e-3) for fails in (False, True) for level in UNITS),
    ],
)
def test_a_pass_without_backward_leaves_nothing(model, level, offload_gib, fails, monkeypatch):
    """Nor does one whose backward breaks off (out of memory, say)."""
    monkeypatch.setattr(offload, "SLAB", 1024)
    monkeypatch.setattr(offload, "SMALL", 64)
    options = {"recompute": level, "offload_gib": offload_gib}

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    class Failing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "dot_product" in func._schema.name and "backward" in func._schema.name:
                raise torch.OutOfMemoryError("no memory left")
            return func(*args, **(kwargs or {}))

    def pass_():
        apply_lemo(model, LeMoConfig(block_size=16, policy="recent", **options))
        try:
            loss = model(**batch(2, 96)).loss
            if fails:
                with pytest.raises(torch.OutOfMemoryError), Failing():
                    loss.backward()
        finally:
            remove_lemo(model)
            model.zero_grad(set_to_none=True)

    pass_()
    before = tensors()
    pass_()
    pass_()
    assert tensors() <= before


@pytest.mark.parametrize("value", ["some", ("full",), ("full", "none", None, "mlp")])
def test_wrong_levels_are_refused(model, value):
    with pytest.raises(ValueError, match="recompute"):
        apply_lemo(model, LeMoConfig(recompute=value))
