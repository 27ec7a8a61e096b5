"""On a CUDA GPU: the same rules at bf16, at sizes that need 64-bit offsets, and through Trainer."""

import warnings

import pytest
import torch
from support.batches import CASES
from support.dense_reference import expected_loss, masked_dense, recorded_sets
from support.hub_client import make_predictor
from support.models import make_model, with_lora
from support.trainers import SPARSE, losses, make_trainer
from transformers import Trainer
from transformers.models.llama import modeling_llama

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.config import LEVELS, UNITS
from lemo_hf.core.attention import _tried as fastest_attention
from lemo_hf.core.families import FAMILIES
from lemo_hf.kernels.replayed import MOST_GRAPHS, Replayed
from lemo_hf.predictors.overlap import overlap_scores

pytestmark = pytest.mark.gpu


def to_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_no_further_from_the_truth_than_a_masked_dense_model(
    family, case, dtype, implementation, monkeypatch
):
    """Error against fp64 of the sparse layers <= twice the masked dense model's at this dtype."""
    inputs = to_gpu(case())
    config = LeMoConfig(block_size=8, policy="random", supervise="all", agree_across_layers=False)

    def masked(model, sets):
        rest = {k: v for k, v in inputs.items() if k != "labels"}
        layers = model.get_base_model().get_submodule(FAMILIES[family].layers)
        with masked_dense(layers, sets, "mlp"):
            logits = model(**rest, use_cache=False).logits
            ones = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
            loss = expected_loss(logits, inputs["labels"], ones, inputs.get("attention_mask"))
            return loss.item(), gradients_of(model, loss)

    def build(implementation, dtype):
        return with_lora(make_model(family, implementation)).cuda().to(dtype)

    model = build(implementation, dtype)
    apply_lemo(model, config)
    with recorded_sets(monkeypatch) as chosen:
        loss = model(**inputs).loss
        gradients = gradients_of(model, loss)
    sets = [(mask.cuda(), mask.cuda()) for _, mask in chosen]
    truth, true_gradients = masked(build("eager", torch.float64), sets)
    same, same_gradients = masked(build("eager", dtype), sets)
    eps = torch.finfo(dtype).eps
    assert abs(loss.item() - truth) <= 2 * abs(same - truth) + 4 * eps * truth
    error = sum((gradients[n] - g).square().sum() for n, g in true_gradients.items()).sqrt()
    allowed = sum((same_gradients[n] - g).square().sum() for n, g in true_gradients.items()).sqrt()
    norm = sum(g.square().sum() for g in true_gradients.values()).sqrt()
    assert error <= 2 * allowed + 4 * eps * norm


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_runs_are_bit_equal(tmp_path, checkpointing):
    options = {"use_cpu": False, "bf16": True, "gradient_checkpointing": checkpointing}

    def model():
        return with_lora(make_model("llama", "sdpa")).bfloat16()

    first = losses(make_trainer(tmp_path, SPARSE, model=model(), **options))
    second = losses(make_trainer(tmp_path, SPARSE, model=model(), **options))
    assert first == second


def test_trainer_on_the_gpu(tmp_path):
    options = {"use_cpu": False, "bf16": True}
    full = LeMoConfig(retention=1.0, block_size=8)
    torch.cuda.reset_peak_memory_stats()
    ours = make_trainer(tmp_path, full, **options)
    plain = make_trainer(tmp_path, None, cls=Trainer, **options)
    assert losses(ours) == pytest.approx(losses(plain), rel=2e-2)
    log = next(log for log in ours.state.log_history if "loss" in log)
    assert 0 < log["lemo/peak_memory_gib"] < 10


def test_predictors_on_the_gpu(tmp_path):
    predictor = make_predictor()
    rows = torch.randn(2, 70, 32).bfloat16()
    given = rows, torch.tensor([[8], [7]]), torch.tensor([[True], [True]])
    expected = [network(*given) for network in predictor.layers]
    for network, scores in zip(predictor.cuda().layers, expected, strict=True):
        found = network(*(x.cuda() for x in given)).cpu()
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)
    predictor.save_pretrained(tmp_path / "predictor")
    config = LeMoConfig(predictor=tmp_path / "predictor", block_size=8, agree_across_layers=False)
    options = {"use_cpu": False, "bf16": True}
    first, second = (make_trainer(tmp_path / "run", config, **options) for _ in range(2))
    assert losses(first) == losses(second)
    log = next(log for log in first.state.log_history if "loss" in log)
    assert log["lemo/attention_retention"] == 3 / 8  # blocks: the default's 0.3, rounded up


def test_offloaded_checkpoints_are_kept_rows(tmp_path):
    options = {"use_cpu": False, "gradient_checkpointing": True}
    plain = make_trainer(tmp_path, SPARSE, **options)
    offload = make_trainer(
        tmp_path, SPARSE, **options, gradient_checkpointing_kwargs={"offload": True}
    )
    assert losses(offload) == pytest.approx(losses(plain), rel=1e-6)


def test_liger_keeps_its_fused_loss(tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    for name, value in list(vars(modeling_llama).items()):
        monkeypatch.setattr(modeling_llama, name, value)  # so that what Liger sets goes back
    options = {"use_cpu": False, "bf16": True}

    def model():
        return make_model("llama", "sdpa", vocab_size=512).bfloat16()

    ours = losses(make_trainer(tmp_path, SPARSE, model=model(), **options))
    liger = make_trainer(tmp_path, SPARSE, model=model(), use_liger_kernel=True, **options)
    assert losses(liger) == pytest.approx(ours, rel=2e-2)
    assert "forward" in vars(liger.model)


def test_kept_rows_save_memory():
    """Peak memory of a pass falls with retention, with and without checkpointing."""
    model = (
        with_lora(
            make_model(
                "llama",
                "sdpa",
                hidden_size=512,
                intermediate_size=2048,
                head_dim=64,
                num_attention_heads=8,
                num_hidden_layers=8,
                max_position_embeddings=16384,
            )
        )
        .cuda()
        .bfloat16()
    )
    ids = torch.randint(3, 97, (1, 16384), device="cuda")

    def peak(**options):
        apply_lemo(model, LeMoConfig(**options))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids).loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        model.zero_grad(set_to_none=True)
        remove_lemo(model)
        return peak

    for checkpointing in (False, True):
        full, half, quarter = (
            peak(retention=share, recompute="full" if checkpointing else "none")
            for share in (1.0, 0.5, 0.25)
        )
        assert half < 0.65 * full and quarter < 0.65 * half + 0.1 * full


def wide_model(dtype=torch.bfloat16, key_value_heads=2):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": key_value_heads}
    model = make_model("llama", "sdpa", **sizes, **heads, num_hidden_layers=6)
    return with_lora(model).cuda().to(dtype)


def step_of(model, ids, **options):
    """Loss and gradients of one sparse pass."""
    apply_lemo(model, LeMoConfig(**options))
    try:
        loss = model(input_ids=ids, labels=ids).loss
        return loss.item(), gradients_of(model, loss)
    finally:
        remove_lemo(model)


@pytest.mark.parametrize("level", UNITS)
@pytest.mark.parametrize("budget", [1 / 16, 1])
def test_host_memory_changes_nothing(level, budget):
    """Rows that went through pinned memory, all of them or as many as the budget takes."""
    model = wide_model(torch.float32, key_value_heads=8)  # in fp32 there is a kernel for those
    ids = torch.randint(3, 97, (2, 4096), device="cuda")
    plain = step_of(model, ids, recompute=level)
    for _ in range(3):  # slabs are used again
        loss, gradients = step_of(model, ids, recompute=level, offload_gib=budget)
        assert loss == plain[0]
        # Attention's backward adds up in no fixed order.
        error = sum((gradients[name] - grad).square().sum() for name, grad in plain[1].items())
        assert error.sqrt() <= 1e-5 * sum(g.square().sum() for g in plain[1].values()).sqrt()


def test_levels_agree():
    model = wide_model()
    ids = torch.randint(3, 97, (2, 4096), device="cuda")
    loss, gradients = step_of(model, ids, recompute="none")
    norm = sum(g.square().sum() for g in gradients.values()).sqrt()
    for level in LEVELS[1:]:
        other, grads = step_of(model, ids, recompute=level)
        assert other == pytest.approx(loss, rel=1e-3)
        error = sum((grads[n] - g).square().sum() for n, g in gradients.items()).sqrt()
        assert error <= 2e-2 * norm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": "selective", "dense_first_layers": 2},
        {"recompute": "full", "offload_gib": 1.0, "dense_first_layers": 2},
        {"recompute": "mlp", "policy": "oracle"},
    ],
)
def test_the_host_never_waits_for_what_a_step_computes(options):
    """No synchronising call between the batch and the end of the optimizer step."""
    model = wide_model()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    ids = torch.randint(3, 97, (1, 8192), device="cuda")
    lemo = apply_lemo(model, LeMoConfig(**options))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()  # kernels compile, pinned memory is taken
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
        step()
    torch.cuda.set_sync_debug_mode("default")
    places = {f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)}
    # transformers looks into the position ids, before the first layer.
    assert not {place for place in places if "masking_utils.py" not in place}
    assert lemo.report()["kept_tokens"] > 0


@pytest.mark.parametrize(("level", "runs"), [("mlp", 1), *((level, 2) for level in UNITS)])
def test_a_unit_runs_again_once(level, runs):
    fastest_attention.cache_clear()  # a trial of kernels must stay outside of the unit
    model = wide_model()
    calls = []
    layer = model.get_base_model().model.layers[2]
    layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append("q"))
    ids = torch.randint(3, 97, (2, 4096), device="cuda")
    step_of(model, ids, recompute=level)
    assert len(calls) == runs


def test_scores_by_a_graph_are_those_without_one():
    """Whatever the row, its padding and its documents; within a recorded pass, too."""
    replayed = Replayed(overlap_scores)

    def given(seed, tokens=500, parts=False):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 60, (2, tokens), generator=generator).cuda()
        asking = torch.zeros_like(ids, dtype=torch.bool)
        asking[:, -40 - seed :] = True
        if not parts:
            return ids, asking, 16, None, None
        places = torch.arange(tokens, device="cuda").expand(2, -1)
        return ids, asking, 16, places >= 10 * seed, places // 200

    for parts in (False, True):
        for seed in range(5):
            arguments = given(seed, parts=parts)
            assert torch.equal(replayed(*arguments), overlap_scores(*arguments))
    assert len(replayed._graphs) == 2
    first = replayed(*given(0))
    replayed(*given(1))
    assert torch.equal(first, overlap_scores(*given(0)))  # which the next one does not overwrite
    for tokens in range(501, 511):  # shapes that come once, then as many as there may be
        replayed(*given(0, tokens))
    for tokens in 2 * list(range(501, 511)):
        arguments = given(1, tokens)
        assert torch.equal(replayed(*arguments), overlap_scores(*arguments))
    assert len(replayed._graphs) == MOST_GRAPHS
