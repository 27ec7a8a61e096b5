"""Perplexity: against one token at a time in fp64, whole logits and transformers' own loss."""

import dataclasses
import json
import logging
import math
from functools import cache

import numpy as np
import pytest
import torch
from support.documents import DOCUMENTS, documents, double_model, run
from support.models import make_model, with_lora
from support.paths import DEMO
from support.processes import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.eval import token_losses
from lemo_hf.eval.token_files import read_token_file
from lemo_hf.eval.token_losses import TokenLosses


@cache
@torch.no_grad()
def naive_loss(document, start, token):
    """Loss of one token of a document when all that is before it begins at ``start``."""
    ids = torch.tensor([DOCUMENTS[document][start:token]])
    logits = double_model()(input_ids=ids, use_cache=False).logits[0, -1]
    assert logits.dtype == torch.float64
    return -float(logits.log_softmax(0)[DOCUMENTS[document][token]])


def naive_sliding(max_length, stride):
    """``(context, loss)`` of each token that the first window with it can score."""
    for number, document in enumerate(DOCUMENTS):
        for token in range(len(document)):
            window = max(0, math.ceil((token - max_length + 1) / stride))
            if token > window * stride:
                context = token - window * stride
                yield context, naive_loss(number, window * stride, token)


def naive_longlora(max_length, stride):
    """Mean loss of each whole window."""
    for number, document in enumerate(DOCUMENTS):
        for start in range(0, len(document), stride):
            if start + max_length <= len(document):
                losses = [naive_loss(number, start, start + n) for n in range(1, max_length)]
                yield math.fsum(losses) / len(losses)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("stride", [12, 6, 5, 1])
def test_sliding_is_one_token_at_a_time(stride, batch_size):
    expected = list(naive_sliding(12, stride))
    result = run(double_model(), stride=stride, batch_size=batch_size, buckets=12)
    mean = math.fsum(loss for _, loss in expected) / len(expected)
    assert result.tokens == len(expected)
    assert result.loss == pytest.approx(mean, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-12)
    if stride < 12:
        assert result.tokens == sum(len(document) - 1 for document in DOCUMENTS)
    for row in result.by_position:
        losses = [loss for context, loss in expected if context == row["first"]]
        assert row["first"] == row["last"] and row["tokens"] == len(losses)
        assert row["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("stride", [12, 5, 1])
def test_longlora_is_the_mean_of_whole_windows(stride, batch_size):
    expected = list(naive_longlora(12, stride))
    result = run(double_model(), protocol="longlora", stride=stride, batch_size=batch_size)
    mean = math.fsum(expected) / len(expected)
    assert (result.windows, result.tokens) == (len(expected), 11 * len(expected))
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-12)
    assert (result.documents, result.skipped_documents) == (4, 3)


def test_strides_that_nobody_named():
    assert run(double_model()).stride == 6
    assert run(double_model(), protocol="longlora").stride == 12
    long = documents(600)
    assert run(double_model(), long, protocol="longlora", max_length=300).windows == 2


def test_buckets_add_up_and_cut_where_they_should():
    result = run(double_model(), buckets=4)
    rows = result.by_position
    assert [(row["first"], row["last"]) for row in rows] == [(1, 2), (3, 5), (6, 8), (9, 11)]
    assert sum(row["tokens"] for row in rows) == result.tokens
    total = math.fsum(row["tokens"] * row["loss"] for row in rows)
    assert total / result.tokens == pytest.approx(result.loss, rel=1e-12)
    assert all(row["perplexity"] == math.exp(row["loss"]) for row in rows)
    short = run(double_model(), documents(4, 5), buckets=4)  # nothing has more context than 4
    assert [row["first"] for row in short.by_position] == [1, 3]
    assert len(run(double_model(), buckets=100).by_position) == 11
    assert json.loads(json.dumps(result.to_dict())) == dataclasses.asdict(result)


def test_batches_hold_windows_of_one_length():
    """A window runs as if it were alone, also where frequencies depend on the longest."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    model = make_model("llama", max_position_embeddings=8, rope_parameters=rope)
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    texts = documents(20, 7, 7, 5, 7, 20, 20, 7, 20)
    result = run(model, texts, stride=8, batch_size=3)
    assert shapes[0] == (1, 2)  # the trial of the head
    assert sorted(shapes[1:]) == [(1, 5), (1, 7), (2, 12), (3, 7), (3, 12), (3, 12)]
    assert sum(rows for rows, _ in shapes[1:]) == result.windows
    assert result.loss == pytest.approx(run(model, texts, stride=8).loss, rel=1e-5)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_what_a_document_may_be(kind):
    result = run(double_model(), [kind(document) for document in DOCUMENTS])
    assert result == run(double_model())
    assert run(double_model(), (kind(document) for document in DOCUMENTS)) == result
    assert run(double_model(), torch.tensor(documents(20, 20))) == run(
        double_model(), documents(20, 20)
    )


FAMILIES = ("llama", "gemma2", "granite", "mixtral", "opt", "cohere", "nanochat", "gpt2", "mamba")


def whole_logits(model, ids, wanted):
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float().log_softmax(2)
    losses = -logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return losses[wanted[:, 1:]]


def some_tokens(rows=3, tokens=40):
    ids = torch.tensor(documents(*[tokens] * rows))
    wanted = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(0)) < 0.6
    wanted[:, :9] = wanted[1, 30:] = False
    return ids, wanted


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_head_by_segments_is_the_models_own_logits(model_type, monkeypatch):
    monkeypatch.setattr(token_losses, "choose_segment_size", lambda *_, **__: 7)
    model = make_model(model_type).eval()
    losses = TokenLosses(model)
    ids, wanted = some_tokens()
    expected = whole_logits(model, ids, wanted)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape))
    torch.testing.assert_close(losses(ids, wanted), expected, rtol=1e-5, atol=1e-5)
    assert max(shape[:-1].numel() for shape in seen) <= 7


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "own", "xlstm"])
def test_logits_that_follow_no_known_rule(model_type):
    model = make_model("llama" if model_type == "own" else model_type).eval()
    if model_type == "own":
        model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits.sin()))
    losses = TokenLosses(model)
    ids, wanted = some_tokens()
    expected = whole_logits(model, ids, wanted)
    assert losses.head is None
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    torch.testing.assert_close(losses(ids, wanted), expected, rtol=1e-5, atol=1e-5)
    first = 8 if model_type != "xlstm" else 0  # it has no logits_to_keep
    assert [shape[1] for shape in shapes] == [40 - first]


def test_kernels_have_the_same_losses(kernels_on):
    model = make_model("gemma2").to(kernels_on).eval()
    ids, wanted = (x.to(kernels_on) for x in some_tokens())
    expected = whole_logits(model, ids, wanted)
    torch.testing.assert_close(TokenLosses(model)(ids, wanted), expected, rtol=1e-5, atol=1e-5)


def test_16_bit_logits_get_a_32_bit_softmax():
    model = make_model("llama").bfloat16().eval()
    ids, wanted = some_tokens()
    losses = TokenLosses(model)(ids, wanted)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, whole_logits(model, ids, wanted), rtol=0.02, atol=0.02)


def test_peft_models():
    adapted = with_lora(make_model("llama"))
    ids, wanted = some_tokens()
    torch.testing.assert_close(
        TokenLosses(adapted.eval())(ids, wanted), whole_logits(adapted, ids, wanted)
    )
    result = run(adapted)
    assert result.loss == run(adapted.get_base_model()).loss  # its layers hold the adapters
    with adapted.disable_adapter():
        assert run(adapted).loss == pytest.approx(run(make_model("llama")).loss, rel=1e-6)
    assert abs(run(adapted.merge_and_unload()).loss - result.loss) < 1e-4
    assert abs(run(make_model("llama")).loss - result.loss) > 1e-3


def test_a_prompt_that_peft_puts_in_front():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(make_model("llama"), config).eval()
    ids, wanted = some_tokens()
    prompt = model.get_prompt(len(ids)).detach()
    embeds = torch.cat([prompt, model.get_input_embeddings()(ids)], 1)
    with torch.no_grad():
        logits = model.get_base_model()(inputs_embeds=embeds).logits[:, 3:].log_softmax(2)
    expected = -logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0][wanted[:, 1:]]
    torch.testing.assert_close(TokenLosses(model)(ids, wanted), expected)


def test_lemo_evaluates_dense_and_flags_come_back():
    model = make_model("llama")
    plain = run(model, documents(60), max_length=40)
    apply_lemo(model, LeMoConfig(block_size=8, retention=0.3))
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    assert run(model, documents(60), max_length=40) == plain
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(ValueError, match="vocabulary"):
        run(model, [[1, 2, 97]])
    assert [module.training for module in model.modules()] == flags
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_compiled_model():
    model = make_model("llama")
    expected = run(model)
    assert run(torch.compile(model, backend="eager")) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "rolling"}, "one of sliding, longlora, got 'rolling'"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"stride": 13}, "stride must be from 1 to max_length=12, .*got 13"),
        ({"stride": 0}, "stride must be from 1 to max_length=12, .*got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"buckets": 0}, "buckets must be at least 1"),
        ({"texts": [[5], []]}, "no document has 2 tokens: the longest of 2 has 1"),
        ({"protocol": "longlora", "max_length": 31}, "no document has 31 tokens: .* has 30"),
        ({"texts": [[5, 6], [7] * 20 + [97]]}, "document 1 has the token 97 at 20.*has 97"),
        ({"texts": [[5, -100]]}, "document 0 has the token -100 at 1"),
        ({"texts": [5, 6, 7]}, "document 0 must be a sequence of token ids, got int '5'"),
        ({"texts": torch.tensor([5, 6])}, "document 0 must be a sequence of token ids, got Tensor"),
        ({"texts": [{"input_ids": [5, 6]}]}, "document 0 must be .*, got dict"),
        ({"texts": ["some text"]}, "document 0 .* integers; it has 'some text'. Tokenise"),
        ({"texts": [[0.5, 1.5]]}, "document 0 .* integers; it has '0.5'"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        run(make_model("llama"), **{"texts": DOCUMENTS, **settings})


def test_what_is_only_warned_of(caplog):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    with caplog.at_level(logging.WARNING):
        run(make_model("llama"), documents(20))
        run(make_model("llama", max_position_embeddings=3, rope_parameters=rope), documents(20))
    assert not caplog.records
    run(make_model("llama", max_position_embeddings=8), documents(20, 1))
    beyond, short = caplog.messages
    assert beyond.startswith("max_length=12 is beyond the model's 8 positions")
    assert short.startswith("1 of 2 documents are shorter than a window")


def test_token_files(tmp_path):
    path = tmp_path / "test.bin"
    path.write_bytes(b"\x01\x00\xff\xff\x00\x01")
    tokens = read_token_file(path)
    assert tokens.tolist() == [1, 65535, 256] and isinstance(tokens, np.memmap)
    assert read_token_file(path, 65536).tolist() == tokens.tolist()
    with pytest.raises(ValueError, match="token 65535 at 1, the model's vocabulary has 32000"):
        read_token_file(path, 32000)
    with pytest.raises(FileNotFoundError, match="no file '.*missing.bin'"):
        read_token_file(tmp_path / "missing.bin")
    for content in (b"", b"abc"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"has {len(content)} bytes"):
            read_token_file(path)


def test_a_token_file_is_a_document(tmp_path):
    stream = [token for document in DOCUMENTS for token in document]
    np.array(stream, "<u2").tofile(tmp_path / "test.bin")
    tokens = read_token_file(tmp_path / "test.bin", 97)
    for protocol in ("sliding", "longlora"):
        result = run(double_model(), [tokens], protocol=protocol, stride=4)
        assert result == run(double_model(), [stream], protocol=protocol, stride=4)


def test_transformers_own_loss_on_real_text():
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "text" / "heldout-oh-money-money.txt").read_text(encoding="utf-8")[3000:6000]
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 600
    with torch.no_grad():
        window = torch.tensor([ids[:256]])
        loss = model(input_ids=window, labels=window).loss.item()
        for protocol in ("sliding", "longlora"):
            result = run(model, [ids[:256]], max_length=256, protocol=protocol)
            assert (result.windows, result.tokens) == (1, 255)
            assert result.loss == pytest.approx(loss, rel=1e-6)
        # As transformers' page on perplexity does it, but each window weighs what it scores.
        total, scored, end = 0.0, 0, 0
        for start in range(0, len(ids), 100):
            before, end = end, min(start + 256, len(ids))
            window = torch.tensor([ids[start:end]])
            labels = window.clone()
            labels[:, : before - start] = -100
            count = int((labels[:, 1:] != -100).sum())
            total += model(input_ids=window, labels=labels).loss.item() * count
            scored += count
            if end == len(ids):
                break
    result = run(model, [ids], max_length=256, stride=100, batch_size=2)
    assert result.tokens == scored == len(ids) - 1
    assert result.loss == pytest.approx(total / scored, rel=1e-6)
    assert 20 < result.perplexity < 60  # the model's own, see its provenance


_TWO = """
import json
from accelerate import PartialState
state = PartialState(cpu=True)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from support.models import make_model
from support.documents import DOCUMENTS, double_model, run
model = double_model().requires_grad_(True)
results = [
    run(DistributedDataParallel(model), stride=4, batch_size=2).to_dict(),
    run(model, protocol="longlora", stride=3).to_dict(),
    run(model, DOCUMENTS[:1], max_length=29).to_dict(),
]
mesh = init_device_mesh("cpu", (2,))
for with_head in (False, True):
    model = make_model("llama")
    for part in [*model.model.layers, *[model.lm_head] * with_head, model]:
        fully_shard(part, mesh=mesh)
    results.append(run(model, batch_size=2).to_dict())
path = f"{sys.argv[1]}/{state.process_index}.json"
open(path, "w").write(json.dumps(results))
"""


@pytest.mark.soak
def test_two_processes_share_the_windows(tmp_path):
    launch(_TWO, tmp_path, processes=[2])
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first == second
    model = double_model()
    alone = [
        run(model, stride=4, batch_size=2),
        run(model, protocol="longlora", stride=3),
        run(model, DOCUMENTS[:1], max_length=29),  # one window: a process has none of its own
        *[run(make_model("llama"), batch_size=2)] * 2,  # sharded there, without and with the head
    ]
    assert [result.windows % 2 for result in alone] == [1] * 5
    for ours, theirs, rel in zip(alone, first, [1e-12] * 3 + [1e-6] * 2, strict=True):
        for row, our_row in zip(theirs.pop("by_position"), ours.by_position, strict=True):
            assert row == pytest.approx(our_row, rel=rel)
        for name in ("loss", "perplexity"):
            assert theirs.pop(name) == pytest.approx(getattr(ours, name), rel=rel)
        assert theirs.items() <= ours.to_dict().items()
