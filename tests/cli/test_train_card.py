"""`lemo train --memory-gib`: rows, recomputation and offload that the plan says fit a card."""

import json
import re
from pathlib import Path

import pytest
import yaml
from support.dry_models import _poison, dry_models_are_shared  # noqa: F401
from support.models import EXTRA, SIZES
from support.paths import DEMO
from support.plans import plans
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from lemo_hf.cli.gpu import Gpu, gpu_called
from lemo_hf.cli.train_settings import read_settings
from lemo_hf.planning.plan import GIB

TEXT = (DEMO / "text" / "train-alice-adams.txt").read_text()[:16_000]
# One way to train is left to plan, which takes a part of the time.
ONE_WAY = ("--training.gradient_checkpointing", "false")
FLAGS = ("train", "--output", "out", "--training.use_cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A book, and the config of a model of 8B parameters, without its weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=32,
        intermediate_size=14336,
        vocab_size=128256,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
    ).save_pretrained(tmp_path / "8b")
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(tmp_path / "8b")
    return tmp_path


def planned(lemo, *flags):
    """The settings of a planned run, the sentence on it, and the peak that these settings have."""
    book = () if "--dataset" in flags else ("--dataset", "book.txt")
    code, out, err = lemo(*FLAGS, "--model", "8b", *book, "--dry-run", *flags)
    assert code == 0, err
    (said,) = re.findall("# (Planned .*)", out)
    settings = yaml.safe_load(out)
    Path("planned.yaml").write_text(out)
    run = read_settings("planned.yaml").build()
    phases = plans(
        LlamaConfig.from_pretrained("8b"),
        run.lemo,
        run.data.tokens,
        lora_rank=8,
        lora_targets="all-linear",
        gradient_checkpointing=run.training.gradient_checkpointing,
        memory_gib=float(flags[flags.index("--memory-gib") + 1]),
        reserve_gib=2.0,
    )
    return settings, said, max(phase.peak for phase in phases.values()) / GIB


@pytest.mark.soak
@pytest.mark.parametrize("card", ["24", "48", "80", "141"])
def test_the_longest_row_of_a_card(card, lemo, folder):
    settings, said, peak = planned(lemo, "--memory-gib", card)
    tokens = settings["data"]["tokens"]
    assert 0.8 * (float(card) - 2) < peak <= float(card) - 2 or tokens == 131072
    assert f"Planned for {card} GiB, 2 of them left to CUDA: rows of {tokens:,} tokens;" in said
    assert f"The predicted peak is {peak:.1f} GiB." in said
    assert tokens % 64 == 0 and tokens > 8192


def test_rows_are_no_longer_than_a_sliding_window(lemo, folder):
    model = LlamaConfig.from_pretrained("8b").to_dict() | {"model_type": "mistral"}
    model |= {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    (folder / "8b" / "config.json").write_text(json.dumps(model))
    code, out, err = lemo(
        *FLAGS, "--model", "8b", "--dataset", "book.txt", "--dry-run", "--memory-gib", "80"
    )
    assert code == 0, err
    assert yaml.safe_load(out)["data"]["tokens"] == 4096
    assert "rows of 4,096 tokens (as the model's sliding window; longer ones are not" in out


def test_attention_with_sinks_is_the_one_that_is_planned(lemo, folder):
    model = AutoConfig.for_model("gpt_oss", **SIZES, **EXTRA["gpt_oss"]).to_dict()
    model |= {"sliding_window": 4096, "architectures": ["GptOssForCausalLM"]}
    (folder / "8b" / "config.json").write_text(json.dumps(model))
    command = (*FLAGS, "--model", "8b", "--dataset", "book.txt", "--dry-run", "--memory-gib", "24")
    code, out, err = lemo(*command, "--tokens", 256)
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["attn_implementation"] == "lemo_sinks"
    assert "nothing is computed again, attention is lemo_sinks. The predicted peak" in out
    code, _, err = lemo(*command, "--tokens", 256, "--model.attn_implementation", "eager")
    assert code == 2 and "'eager' is not predicted: use 'lemo_sinks'" in err


def test_what_needs_least_time_is_taken(lemo, folder):
    """Short rows are stored whole; the longest are computed again and offloaded."""
    found = [planned(lemo, "--memory-gib", "24", "--tokens", n) for n in (512, 40960)]
    checkpointing = [run["training"]["activation_checkpointing"] for run, _, _ in found]
    (none, offload) = [run["lemo"]["offload_gib"] for run, _, _ in found]
    assert checkpointing == [False, True] and none is None and offload > 0
    assert "nothing is computed again" in found[0][1]
    assert f"up to {offload:g} GiB wait in pinned host memory" in found[1][1]
    assert all(peak <= 22 for _, _, peak in found)


@pytest.mark.soak
def test_rows_between_them_are_computed_again_alone(lemo, folder):
    run, said, peak = planned(lemo, "--memory-gib", "24", "--tokens", 16384)
    assert run["training"]["activation_checkpointing"] is True
    assert run["lemo"]["offload_gib"] is None and "computed again" in said and peak <= 22


def test_layers_that_fit_store_everything(lemo, folder):
    """Where rows are computed again and memory is left, it is used; a user's word on it stays."""
    rows = ("--memory-gib", "48", "--tokens", "32768", "--lemo.dense_finish", "0")
    run, said, peak = planned(lemo, *rows)
    levels = run["lemo"]["recompute"]
    stored = levels.count("none")
    assert levels == ["selective"] * (32 - stored) + ["none"] * stored and 0 < stored < 32
    assert f"in the first {32 - stored} layers all but attention and its projection is" in said
    assert f"in the last {stored} nothing is computed again. The predicted peak" in said
    assert f"{peak:.1f} GiB" in said and 44 < peak <= 46
    run, said, peak = planned(lemo, *rows, "--training.gradient_checkpointing", "true")
    assert run["lemo"]["recompute"] is None and "again. The" in said and peak < 40


def test_what_was_said_stays(lemo, folder):
    said = ("--training.gradient_checkpointing", "--lemo.offload_gib", 4, "--lora.r", 8)
    settings, _, _ = planned(lemo, "--memory-gib", "80", "--tokens", 4096, *said)
    assert settings["lemo"]["offload_gib"] == 4 and settings["data"]["tokens"] == 4096
    assert settings["training"]["activation_checkpointing"] is True


def test_answers_have_no_finish_and_so_longer_rows(lemo, folder):
    (folder / "asks.jsonl").write_text(json.dumps({"prompt": TEXT[:200], "completion": " Yes."}))
    text, said, _ = planned(lemo, "--memory-gib", "24", *ONE_WAY)
    assert "Answers" not in said
    asks, said, _ = planned(lemo, "--memory-gib", "24", "--dataset", "asks.jsonl", *ONE_WAY)
    assert "Answers that are a larger share of their row than lemo.retention are kept whole" in said
    assert asks["data"]["tokens"] > text["data"]["tokens"]


def test_times_are_those_of_the_card_that_is_here(lemo, folder, monkeypatch):
    """As `lemo plan --gpu` tells them; without a card there are none."""
    flags = ("--memory-gib", "80", "--tokens", 4096, *ONE_WAY)
    here = "lemo_hf.cli.train_card.gpu_here"
    monkeypatch.setattr(here, Gpu)
    assert "optimizer step" not in planned(lemo, *flags)[1]
    monkeypatch.setattr(here, lambda: gpu_called("a100"))
    _, said, _ = planned(lemo, *flags, "--training.gradient_accumulation_steps", 4)
    options = ("--tokens", 4096, "--lora-target", "all-linear", "--gpu", "a100", "--json")
    found = json.loads(lemo("plan", "--model", "8b", *options)[1])
    sparse, finish = (f"{4 * found[name]['step_ms']:,.0f}" for name in ("LeMo", "finish"))
    assert f"An optimizer step takes about {sparse} ms, {finish} ms in the finish." in said
    assert f"The predicted peak is {found['finish']['peak'] / GIB:.1f} GiB." in said
    assert "Times are of an NVIDIA A100 SXM 80 GB by its data sheet" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--tokens", 2**22, *ONE_WAY),
            "rows of 4,194,304 tokens do not fit; the longest that fit have",
        ),
        (("--model.rope_type", "yarn"), "which is not known: give --tokens"),
        (("--model", "9b"), "model '9b'"),
        (
            ("--memory-gib", "nan"),
            "--memory-gib nan: give the memory of a GPU, more than the 2 GiB",
        ),
        (("--memory-gib", 2), "--memory-gib 2: give the memory of a GPU"),
    ],
)
def test_mistakes(flags, message, lemo, folder):
    model = () if "--model" in flags else ("--model", "8b")
    code, out, err = lemo(*FLAGS, "--dataset", "book.txt", "--memory-gib", 24, *model, *flags)
    assert code == 2 and message in err and "Traceback" not in err and not out


def test_it_trains(lemo, folder):
    small = ("--training.max_steps", 1, "--training.bf16", "false", "--model.dtype", "float32")
    code, out, err = lemo(
        *(
            *FLAGS,
            "--dataset",
            "book.txt",
            "--model",
            DEMO / "model",
            "--model.dtype",
            "float32",
            "--memory-gib",
            24,
        ),
        *(*small, "--training.gradient_accumulation_steps", 1),
    )
    assert code == 0, err
    assert "rows of 512 tokens; nothing is computed again" in out  # its positions
    assert "rows of 512 tokens, 1 a step" in out and "Wrote out" in out


def test_an_old_gpu_asks_for_float16(lemo, folder, monkeypatch):
    old = Gpu("Tesla T4", 7, triton=False)
    monkeypatch.setattr("lemo_hf.cli.train_card.gpu_here", lambda: old)
    flags = ("--model", "8b", "--dataset", "book.txt", "--dry-run", "--memory-gib", "16")
    code, _, err = lemo(*FLAGS, *flags)
    assert code == 2 and "no bfloat16 either: give dtype='float16'" in err
