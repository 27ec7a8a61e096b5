"""`lemo merge`: the merged model is the adapted one, stretched positions and all."""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from support.hub_server import TOKEN, Hub
from support.models import with_lora
from support.paths import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MODEL = str(ROOT / "examples" / "demo" / "model")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
TRAINED = f"""
model: {{name: {MODEL}, dtype: float32, rope_type: yarn}}
data: {{dataset: book.txt, tokens: 2048}}
lora: {{r: 4}}
training: {{output_dir: out}}
"""


@pytest.fixture
def adapter(tmp_path):
    """A directory as `lemo train` leaves it, and the adapted model."""
    config = AutoConfig.from_pretrained(MODEL)
    config.rope_parameters |= YARN
    config.max_position_embeddings = 2048
    base = AutoModelForCausalLM.from_pretrained(MODEL, config=config, dtype=torch.float32)
    tuned = with_lora(base, task_type="CAUSAL_LM").eval()
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "lemo_train.yaml").write_text(TRAINED)
    return tmp_path / "adapter", tuned


def test_the_merged_model_is_the_adapted_one(lemo, tmp_path, adapter):
    folder, tuned = adapter
    code, out, err = lemo("merge", "--adapter", folder, "--output", tmp_path / "merged", "--json")
    assert code == 0, err
    assert json.loads(out)["base"] == MODEL
    assert not list((tmp_path / "merged").glob("*.bin"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32 and merged.config.max_position_embeddings == 2048
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("The sea was quiet. " * 200)
    ids = torch.tensor([ids["input_ids"][:700]])  # beyond the base model's 512
    with torch.no_grad():
        expected = tuned(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, atol=2e-3, rtol=1e-3)
        plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(ids).logits
    assert (plain - expected).abs().max() > 1  # so the comparison says something


def test_an_adapter_of_somebody_else(lemo, tmp_path, adapter):
    """Without lemo_train.yaml: the base model that is given, in the dtype asked for."""
    folder, _ = adapter
    (folder / "lemo_train.yaml").unlink()
    merged = ("merge", "--adapter", folder, "--output", tmp_path / "merged")
    code, out, err = lemo(*merged, "--model", MODEL, "--dtype", "bfloat16")
    assert code == 0 and f"merged into {MODEL}" in out, err
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.dtype == torch.bfloat16 and found.config.max_position_embeddings == 512
    code, _, err = lemo(*merged)
    assert code == 2 and "is not empty" in err and "Traceback" not in err
    code, _, err = lemo("merge", "--adapter", tmp_path / "no", "--output", tmp_path / "x")
    assert code == 2 and "no" in err and "Traceback" not in err


def test_a_push_that_fails_says_that_the_folder_is_whole(lemo, tmp_path, adapter, monkeypatch):
    """Offline, as all tests are, and where the Hub's client raises an error of its own."""
    folder, _ = adapter
    for name, broken in (("offline", None), ("broken", RuntimeError("the socket broke."))):
        if broken is not None:
            monkeypatch.setattr(PreTrainedModel, "push_to_hub", Mock(side_effect=broken))
        out = tmp_path / name
        code, printed, err = lemo("merge", "--adapter", folder, "--output", out, "--push", "me/m")
        assert code == 2 and not printed and "Traceback" not in err
        assert f"{out} holds the whole merged model, and it was not uploaded to me/m (" in err
        assert err.strip().endswith(f"). Upload it later: hf upload me/m {out}")
        assert "the socket broke)" in err or broken is None
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert merged.config.max_position_embeddings == 2048
        AutoTokenizer.from_pretrained(out)


def test_push(tmp_path, adapter):
    folder, _ = adapter
    with Hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        options = ("merge", "--adapter", folder, "--output", tmp_path / "merged")
        options = (*options, "--push", "me/merged", "--json")
        ended = subprocess.run(
            [sys.executable, "-m", "lemo_hf.cli", *map(str, options)],
            cwd=ROOT,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        files = hub.files("me/merged")
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
        weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
        assert files["model.safetensors"] == weights
