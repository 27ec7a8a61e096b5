"""On a CUDA GPU, as on one of Volta or Turing: no Triton, no bf16, no FlashAttention."""

import gc

import pytest
import torch
from support.models import batch, loss_and_gradients, make_model, relative_error, with_lora
from support.plans import plan
from support.trainers import losses, make_trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo, remove_lemo
from lemo_hf.core import attention
from lemo_hf.kernels import launch
from lemo_hf.planning.dry_step import workspaces

pytestmark = pytest.mark.gpu
OLD = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@pytest.fixture(autouse=True)
def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})
    monkeypatch.setattr(launch, "WIDENING", {"cuda"})
    monkeypatch.setattr(attention, "_CANDIDATES", ())
    launch.settle.cache_clear()
    attention._tried.cache_clear()
    with sdpa_kernel(OLD):
        yield
    launch.settle.cache_clear()
    attention._tried.cache_clear()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("retention", [0.5, 1.0])
def test_fp16_is_near_fp32(family, retention):
    model = with_lora(make_model(family, "sdpa")).cuda()
    inputs = {name: x.cuda() for name, x in batch().items()}
    config = LeMoConfig(retention=retention, block_size=8, policy="recent")
    results = []
    for dtype in (torch.float32, torch.float16):
        lemo = apply_lemo(model.to(dtype), config)
        assert "compute capability 7.5, Triton needs 8.0" in lemo.describe()
        results.append(loss_and_gradients(model, **inputs))
        assert not launch.DEVICES
        remove_lemo(model)
    (truth, exact), (found, gradients) = results
    assert found == pytest.approx(truth, rel=5e-3)
    most = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():
        if gradient.norm() > 1e-2 * most:
            assert relative_error(gradients[name].float(), gradient) < 0.05, name


def test_the_trainer_with_fp16_is_stock_at_retention_1(tmp_path):
    def train(cls, retention):
        model = with_lora(make_model("llama", "sdpa"))
        config = LeMoConfig(retention=retention, block_size=8)
        trainer = make_trainer(
            tmp_path, config, cls=cls, model=model, use_cpu=False, fp16=True, max_steps=12
        )
        return losses(trainer)

    stock = train(Trainer, 1.0)
    assert train(LeMoTrainer, 1.0) == pytest.approx(stock, rel=2e-3)
    ours = train(LeMoTrainer, 0.5)
    assert ours[-1] < ours[0]


def test_scores_are_not_stored_where_heads_share_keys():
    """8 query heads for 2 key heads: an expanded key is small, a score for each pair is not."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = with_lora(make_model("llama", "sdpa", **sizes)).cuda().half()
    inputs = {name: x.cuda() for name, x in batch(rows=1, tokens=8192).items()}
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=64))
    torch.cuda.reset_peak_memory_stats()
    model(**inputs).loss.backward()
    assert torch.cuda.max_memory_allocated() < 8 * 8192**2 * 2  # of one layer, in fp16


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("labels", [None, 200])
def test_the_plan_is_the_peak(checkpointing, labels):
    gc.collect()
    some = torch.ones(64, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    (some @ some).sum().backward()  # cuBLAS takes its memory, as other tests may have made it do
    held = torch.cuda.memory_allocated()
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "vocab_size": 8192}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 6}
    model = with_lora(make_model("llama", "sdpa", **sizes)).cuda().half()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(8192, (1, 8192), device="cuda")
    given = ids.clone()
    given[:, : -(labels or 8192)] = -100
    lemo = LeMoConfig(retention=0.5, dense_finish=0)
    apply_lemo(model, lemo)
    settings = {"dtype": "float16", "adapter_dtype": "float16", "autocast": False}
    settings |= {"lora_rank": 4, "lora_targets": "all-linear", "triton": False, "labels": labels}
    found = plan(model.config, lemo, 8192, gradient_checkpointing=checkpointing, **settings)
    torch.cuda.reset_peak_memory_stats()
    model(input_ids=ids, labels=given).loss.backward()
    there = found.parts["optimizer states"] + workspaces(9)  # no optimizer, and held already
    peak = torch.cuda.max_memory_allocated() - held
    assert peak == pytest.approx(found.peak - there, rel=0.01)
