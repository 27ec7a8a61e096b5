"""Models and settings whose memory is not predicted: the value, and the way out."""

import pytest
from support.allocations import LLAMA
from support.plans import plan
from transformers import AutoConfig, LlamaConfig

from lemo_hf import LeMoConfig


def test_steps_of_several_processes_are_refused():
    with pytest.raises(ValueError, match="sequence_parallel_size=2 is not predicted"):
        plan(LLAMA, LeMoConfig(sequence_parallel_size=2), 1024)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gemma2", {}, "attn_logit_softcapping=50.0"),
        ("mamba", {}, "'mamba' is not supported"),
        ("gemma3", {}, "not predicted as a whole: plan its language model"),
        ("lfm2", {}, "'lfm2' is not predicted: what its recurrent layers store depends"),
        ("bloom", {}, "by 'eager' alone, which stores scores"),
        ("gpt_oss", {}, "sliding_window=128 is shorter than 1024"),
        ("gpt_oss", {"attn_implementation": "eager"}, "'eager' is not predicted: use 'lemo_sinks'"),
        ("llama", {"attn_implementation": "lemo_sinks"}, "is not predicted: use 'sdpa'"),
        ("mistral", {"sliding_window": 512}, "sliding_window=512 is shorter than 1024"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ("llama", {"attn_implementation": "eager"}, "'eager' is not predicted"),
    ],
)
def test_models_that_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        plan(AutoConfig.for_model(kind, **options), LeMoConfig(), 1024)


@pytest.mark.parametrize(
    ("kind", "options", "way_out"),
    [
        ("mistral", {"sliding_window": 512}, "Plan for rows of at most 512 tokens, or run a few"),
        ("phi3", {"sliding_window": 512}, "Plan for rows of at most 512 tokens, or run a few"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not predicted: run a few"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1 is not predicted: run a few steps"),
        ("gemma2", {}, "run a few steps and read lemo/peak_memory_gib"),
    ],
)
def test_ways_out_that_the_command_has(kind, options, way_out, lemo, tmp_path):
    """It has no option that changes the config, nor has training."""
    AutoConfig.for_model(kind, **options).save_pretrained(tmp_path)
    code, _, err = lemo("plan", "--model", tmp_path, "--tokens", 1024)
    assert code == 2 and way_out in err
    assert not {"set", "=none"} & set(err.lower().split())
    if "sliding_window" in options:
        assert lemo("plan", "--model", tmp_path, "--tokens", 512)[0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens must be .* got 0"),
        ({"tokens": 2**22 + 1}, "tokens=4,194,305: rows of up to 4,194,304 are planned"),
        ({"batch_size": 0}, "batch_size must be .* got 0"),
        ({"lora_rank": 1.5}, "lora_rank must be .* got 1.5"),
        ({"lora_targets": ["lm_head"]}, "lora_targets.*lm_head.*q_proj"),
        ({"lora_targets": []}, "lora_targets"),
        ({"dtype": "int8"}, "dtype must be .* got 'int8'"),
        ({"dtype": "float32"}, "of float32 weights is not predicted"),
        ({"labels": 0}, "labels must be .* got 0"),
        ({"capability": 0}, "capability must be .* got 0"),
        ({"triton": False}, "no bfloat16 either: give dtype='float16'"),
        ({"triton": False, "dtype": "float16", "lemo_config": LeMoConfig(fp8=True)}, "fp8=True: a"),
        ({"triton": False, "dtype": "float16", "lemo_config": None}, "a score for each pair"),
        ({"lemo_config": LeMoConfig(threshold=1.0)}, "threshold=1.0.*retention"),
    ],
)
def test_settings_that_are_refused(settings, message):
    values = {"lemo_config": LeMoConfig(), "tokens": 1024, **settings}
    with pytest.raises(ValueError, match=message):
        plan(LLAMA, values.pop("lemo_config"), values.pop("tokens"), **values)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (["--reserve-gib", 3], "--reserve-gib has no effect without --memory-gib: leave it out."),
        (["--lora-rank", 0, "--lora-target", "q_proj"], "--lora-target has no effect with"),
        (["--no-kbit-training"], "--no-kbit-training has no effect without --load-in-4bit or"),
        (["--finish-retention", 0.5, "--labels", 9], "no effect where there is no finish: set"),
        (["--finish-retention", 0.5, "--dense-finish", 0], "no effect where there is no finish"),
    ],
)
def test_options_that_change_nothing_are_refused(options, idle, lemo, tmp_path):
    LLAMA.save_pretrained(tmp_path)
    code, _, err = lemo("plan", "--model", tmp_path, *options)
    assert code == 2 and idle in err


def test_options_that_have_an_effect_are_not(lemo, tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    command = ("plan", "--model", tmp_path, "--tokens", 256, "--json")
    for options in (
        ["--load-in-4bit", "--no-kbit-training"],
        ["--finish-retention", 0.5, "--labels", 9, "--dense-finish", 0.1],
        ["--finish-retention", 0.5, "--kbit-training", "--load-in-8bit"],
        ["--finish-retention", 0.5, "--labels", 256],
    ):
        code, _, err = lemo(*command, *options)
        assert code == 0, err
