"""`lemo plan`: what it prints is what the plan says."""

import dataclasses
import json

from support.models import make_model
from support.plans import longest, plan
from transformers import LlamaConfig

from lemo_hf import LeMoConfig


def test_the_command(lemo, tmp_path):
    shape = {"hidden_size": 1024, "num_hidden_layers": 8, "vocab_size": 32000}
    config = make_model("llama", "sdpa", **{**shape, "num_hidden_layers": 1}).config
    config.num_hidden_layers = 8
    config.save_pretrained(tmp_path)
    options = ("plan", "--model", tmp_path, "--tokens", 8192, "--retention", 0.3)
    code, out, err = lemo(*options, "--memory-gib", 3, "--reserve-gib", 1, "--json")
    assert code == 0 and "%|" not in err, err
    result, lemo_config = json.loads(out), LeMoConfig(retention=0.3)
    for name, what in (("LeMo", lemo_config), ("without", None)):
        expected = plan(config, what, 8192, memory_gib=3, reserve_gib=1)
        assert result[name]["peak"] == expected.peak == sum(result[name]["parts"].values())
        alone = what and dataclasses.replace(what, dense_finish=0)
        assert result[name]["longest"] == longest(config, alone, 3, reserve_gib=1)
        assert result[name]["fits"] == (result[name]["longest"] >= 8192)
    assert result["LeMo"]["longest"] > 2 * result["without"]["longest"] > 0
    code, out, _ = lemo(*options, "--gradient-checkpointing", "--lora-rank", 0)
    full = plan(config, lemo_config, 8192, lora_rank=None, gradient_checkpointing=True)
    assert code == 0 and f"{full.peak / 2**30:.2f}" in out and "optimizer states" in out
    assert "selective" in out and "pinned" not in out
    code, out, _ = lemo(*options, "--recompute", "full", "--offload-gib", 1, "--json")
    leaves = dataclasses.replace(lemo_config, recompute="full", offload_gib=1)
    expected = plan(config, leaves, 8192)
    assert code == 0 and json.loads(out)["LeMo"]["peak"] == expected.peak
    assert json.loads(out)["LeMo"]["pinned"] == expected.pinned > 0
    code, _, err = lemo(*options, "--offload-gib", 1)
    assert code == 2 and "moves what recomputed layers store, and none is" in err
    code, _, err = lemo(*options, "--memory-gib", 24, "--reserve-gib", 24)
    assert code == 2 and "give the memory of a GPU, more than the 24 GiB" in err
    assert "or a lower --reserve-gib." in err
    for nothing in (0, "inf"):  # which no reserve helps
        code, _, err = lemo(*options, "--memory-gib", nothing)
        assert code == 2 and "the 2 GiB that are left to CUDA." in err, err
    code, _, err = lemo(*options, "--memory-gib", 24, "--reserve-gib", -5)
    assert code == 2 and "--reserve-gib -5: give a number of GiB, 0 or more." in err
    code, _, err = lemo(*options, "--config", tmp_path)
    assert code == 2 and "leave out --retention" in err


def test_weights_are_planned_in_the_dtype_that_the_config_says(lemo, tmp_path):
    """As they are loaded: most configs say bfloat16, and without a word it is that."""
    found = {}
    for said in (None, "bfloat16", "float32"):
        config = LlamaConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128, dtype=said)
        config.save_pretrained(tmp_path / str(said))
        asked = ("plan", "--model", tmp_path / str(said), "--tokens", 512, "--json")
        code, out, err = lemo(*asked)
        assert code == 0, err
        found[said] = json.loads(out)
    weights = {said: result["LeMo"]["parts"]["weights"] for said, result in found.items()}
    assert weights["float32"] == 2 * weights["bfloat16"] == 2 * weights[None]
    assert found["float32"]["dtype"] == "float32" and found["float32"]["autocast"] is False
