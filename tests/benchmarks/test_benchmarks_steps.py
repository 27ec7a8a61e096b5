"""The benchmarks' own parts: dry steps, S2-Attn, and what they find in a memory snapshot."""

import sys

import pytest
import torch
from support.paths import ROOT
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "benchmarks"))

import dry_steps
import timeline
from bench_longest import parse_args
from dry_host import counted_host
from longest_search import Search, search_longest
from model_shapes import LORA, model_config
from providers import provider_of
from quantized_base import Base
from s2_attention import s2_attention_forward
from step_table import labels_of, step_row
from steps import Bench
from support.plans import plan

CPU = torch.device("cpu")


def naive_s2(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """S2-Attn by a mask for each head: groups, and groups half a group later."""
    tokens, heads = query.shape[2], query.shape[1]
    size, place = tokens // 4, torch.arange(tokens)
    groups = [place // size, (place + size // 2) // size]
    causal = place[:, None] >= place[None]
    masks = [causal & (group[:, None] == group[None]) for group in groups]
    mask = torch.stack([masks[head >= heads // 2] for head in range(heads)])
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize(("batch", "key_heads"), [(1, 4), (2, 2)])
def test_s2_attention_is_the_masked_one(batch, key_heads):
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    shapes = [(batch, heads, 32, 8) for heads in (4, key_heads, key_heads)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out, _ = s2_attention_forward(module, *inputs, None)
    expected = naive_s2(*inputs)
    assert torch.allclose(out, expected)
    weights = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(found, wanted)


def test_dry_kernels_do_no_arithmetic_and_go_away():
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    with dry_steps.DryKernels(CPU) as dry:
        shapes = [
            torch.mm(left, right).shape,
            torch.addmm(torch.ones(5), left, right).shape,
            torch.bmm(left[None], right[None]).shape,
            torch.nn.functional.linear(left[None], right.T.contiguous(), torch.ones(5)).shape,
        ]
        out = torch.zeros(3, 5)
        torch.mm(left, right, out=out)
    assert [tuple(x)[-2:] for x in shapes] == [(3, 5)] * 4
    assert not out.any()
    assert dry.flops == 5 * 2 * 3 * 4 * 5
    assert torch.equal(torch.mm(left, right), torch.full((3, 5), 4.0))


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_dry_attention_has_the_shapes_of_the_real_one(backend):
    name = f"_scaled_dot_product_{backend}_attention"
    sizes = [(2, 16, heads, 8) for heads in (4, 4, 4)]
    q, k, v = (torch.zeros(size, requires_grad=True) for size in sizes)
    operands = [x.transpose(1, 2) for x in (q, k, v)]
    own = {"efficient": (None, True), "cudnn": (None, True), "flash": ()}[backend]
    with dry_steps.DryKernels(CPU) as dry:
        out = getattr(torch.ops.aten, name)(*operands, *own, 0.0, True)[0]
        assert out.shape == (2, 4, 16, 8)
        out.backward(torch.zeros_like(out))
    assert q.grad.shape == k.grad.shape == v.grad.shape == (2, 16, 4, 8)
    assert dry.flops == (2 + 5) * 2 * 2 * 4 * 16 * 16 * 8 // 2


@pytest.fixture(scope="module")
def bench():
    return Bench("Llama-3 8B", 256, CPU, tiny=True)


@pytest.mark.parametrize(
    "name", ["hf", "hf+checkpointing+offload", "lemo", "lemo+checkpointing", "lemo+offload"]
)
def test_a_dry_step_changes_nothing_and_counts_operations(bench, name):
    before = [p.detach().clone() for g in bench.optimizer.param_groups for p in g["params"]]
    dry = bench.dry(provider_of(name), 256)
    after = [p.detach() for g in bench.optimizer.param_groups for p in g["params"]]
    assert dry.status == "ok"
    assert all(map(torch.equal, before, after))
    if name != "hf+checkpointing+offload":  # pinned memory needs a GPU
        with dry_steps.numbers_kept(bench.optimizer):
            assert isinstance(bench.real(provider_of(name), 256), dict)


def test_axolotls_checkpointing_computes_all_but_attention_again(bench):
    pytest.importorskip("axolotl")
    counted = {name: bench.dry(provider_of(f"hf{name}"), 256) for name in ("", "+checkpointing")}
    selective = bench.dry(provider_of("hf+axolotl"), 256)
    assert selective.status == "ok"
    assert counted[""].flops < selective.flops < counted["+checkpointing"].flops


@pytest.mark.parametrize("kbit_training", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind, kbit_training):
    pytest.importorskip("bitsandbytes")
    base = Base(kind, kbit_training)
    bench = Bench("Llama-3 8B", 256, CPU, tiny=True, base=base)
    model = bench.models.model
    weights = [p for p in model.parameters() if not p.is_floating_point()]
    assert len(weights) == 7 * 6 and not any(p.is_meta for p in model.parameters())
    settings = {"lora_rank": LORA["r"], **base.plan_settings}
    parts = plan(model_config("Llama-3 8B", tiny=True), None, 256, **settings).parts
    rest = [p for n, p in model.named_parameters() if p.is_floating_point() and "lora" not in n]
    assert parts["weights"] == sum(p.nbytes for p in rest)
    adapters = [p for g in bench.optimizer.param_groups for p in g["params"]]
    wide = kbit_training or kind == "int8"  # PEFT gives 8-bit linears fp32 adapters always
    assert {p.dtype for p in adapters} == {torch.float32 if wide else torch.bfloat16}
    for name in ("hf+checkpointing", "lemo+checkpointing"):
        real = bench.real(provider_of(name), 256)
        assert isinstance(real, dict) and 5 < real["loss"] < 8  # log 512 is 6.2
        assert bench.dry(provider_of(name), 256).status == "ok"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--kbit-training", "give --quantized nf4"),
        ("--quantized int8", "--parts verify or real"),
        ("--quantized nf4 --providers liger", "liger runs on 16-bit weights"),
        ("--providers nobody", "no provider 'nobody'"),
    ],
)
def test_what_the_search_refuses(line, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(line.split())
    assert message in capsys.readouterr().err


def test_operations_are_those_pytorch_counts(bench):
    dry = bench.dry(provider_of("hf"), 256)
    model = bench.models.model
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, 256, dtype=torch.int64)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    # FlopCounterMode does not know attention on the CPU: 2 products forward and 5 backward.
    config = model.config
    attention = 7 * 2 * config.num_hidden_layers * config.hidden_size * 256**2 // 2
    assert dry.flops == counter.get_total_flops() + attention


def test_host_memory_is_counted():
    with counted_host(rounding=True) as host:
        host.add(3)
        host.add(5)
        host.remove(5)
    assert (host.now, host.most) == (4, 12)
    assert host.blocks == {4: 1, 8: 1}


def frame(file: str, name: str) -> dict:
    return {"filename": f"/x/{file}", "name": name, "line": 1}


def test_a_trace_is_split_by_origin():
    attend = [frame("torch/functional.py", "sdpa"), frame("lemo_hf/core/layer.py", "attend")]
    loss = [frame("lemo_hf/kernels/segment_cross_entropy.py", "forward")]
    stream = 8 * 2**30

    def alloc(addr, size, frames):
        return {"action": "alloc", "addr": addr, "size": size, "frames": frames, "time_us": addr}

    def free(addr):
        return {"action": "free_requested", "addr": addr, "size": 0, "time_us": 10 + addr}

    trace = [
        alloc(1, stream, [frame("torch/nn/modules/sparse.py", "forward")]),
        alloc(2, 2 * 2**30, attend),  # until the backward
        alloc(3, 2**30, attend),
        free(3),
        {"action": "free_completed", "addr": 3, "size": 0},
        alloc(4, stream, loss),
        alloc(5, 2**30, loss),
        free(5),
        alloc(6, 2**29, []),
        free(2),
        free(6),
        free(4),
        free(1),
    ]
    pieces, times = timeline.pieces_of(trace, stream)
    assert [piece.origin for piece in pieces] == [
        timeline.STREAM,
        timeline.STORED,
        timeline.ATTENTION,
        timeline.STREAM,
        timeline.LOSS,
        timeline.ATTENTION,
    ]
    most, rows = timeline.at_the_peak(pieces)
    assert most == 2 * stream + 3 * 2**30
    assert rows[0]["origin"] == timeline.STREAM
    series = timeline.series_of(pieces, times, base_bytes=2**30, points=4)
    assert len(series) == 4
    assert max(sum(entry[1:]) for entry in series) == 1 + 16 + 3


@pytest.mark.parametrize(
    ("line", "limit", "expected"),
    [((16, 1e-4), None, 1230000), ((16, 1e-3), None, 123000), ((16, 1e-4), 262144, 262144)],
)
def test_the_search_ends_between_a_length_that_fits_and_one_that_does_not(line, limit, expected):
    def try_at(tokens):
        peak = line[0] + line[1] * tokens
        if limit is not None and tokens > limit:
            return "host memory", peak
        return ("ok" if peak <= 139 else "oom"), peak

    known = {tokens: line[0] + line[1] * tokens for tokens in (16384, 32768)}
    found = search_longest(Search(4096, known), try_at, 139.0, float("inf"))
    assert found.done
    assert found.fits <= expected < found.too_long
    assert found.too_long <= max(1.04 * found.fits + 4096, found.fits + 4096)
    assert found.limit == ("oom" if limit is None else "host memory")


def test_a_step_that_trains_half_of_the_labels_is_not_taken_for_one_that_trains_all():
    shared = {"model": "M", "tokens": 1024, "status": "ok", "peak_gib": 1.0, "config": None}
    lemo = {**shared, "provider": "lemo", "retention": 0.5, "ms_median": 100.0}
    rival = {**shared, "provider": "hf", "retention": None, "ms_median": 250.0}
    assert step_row(rival, lemo)[4:7] == ["250", "4,096", "4,096"]
    assert step_row(rival, lemo)[-3:] == ["2.50×", "1.25×", "1.00×"]
    assert step_row(lemo, lemo)[4:7] == ["100", "10,240", "5,120"]
    assert labels_of(lemo, 512) == labels_of(rival, 512) == 512
