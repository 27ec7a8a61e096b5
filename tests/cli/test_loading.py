"""Weights that a checkpoint does not hold are refused, where transformers would draw them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_model
from support.paths import MODEL

from lemo_hf.cli.loading import load_causal_lm

DEMO = MODEL


def saved(folder, rename=None, **settings):
    """A checkpoint of a tiny Llama; ``rename`` gives the name of a weight, None drops it."""
    make_model("llama", num_hidden_layers=2, **settings).save_pretrained(folder)
    if rename is not None:
        renamed(folder / "model.safetensors", rename)
    return str(folder)


def renamed(file, rename):
    """Weights by other names in ``file``, and without those that have none."""
    weights = {rename(name): x for name, x in load_file(file).items() if rename(name)}
    save_file(weights, file, metadata={"format": "pt"})


def test_whole_checkpoints_load(tmp_path):
    """A tied head is in no file, and no fault."""
    for tied in (True, False):
        model = load_causal_lm(saved(tmp_path / str(tied), tie_word_embeddings=tied))
        expected = make_model("llama", num_hidden_layers=2, tie_word_embeddings=tied)
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_a_missing_weight_is_named(tmp_path):
    gone = "model.layers.1.mlp.up_proj.weight"
    name = saved(tmp_path, lambda weight: None if weight == gone else weight)
    with pytest.raises(ValueError, match=f"no values for 1 weight of LlamaForCausalLM.*{gone}"):
        load_causal_lm(name)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_commands_refuse_a_language_model_under_other_names(command, tmp_path, lemo):
    """As a multimodal checkpoint holds it; nothing is trained."""
    model = shutil.copytree(DEMO, tmp_path / "model")
    renamed(model / "model.safetensors", lambda weight: f"text_tower.{weight}")
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "Once upon a time. " * 60}) + "\n", encoding="utf-8"
    )
    arguments = ["--model", model, "--dataset", tmp_path / "a.jsonl"]
    if command == "eval":
        code, _, err = lemo("eval", "perplexity", *arguments, "--json")
    else:
        more = ["--full", "--tokens", 64, "--output", tmp_path / "out", "--training.use_cpu"]
        code, _, err = lemo("train", *arguments, *more)
    assert code == 2 and "has no values for" in err
    assert "model.embed_tokens.weight" in err and "name a checkpoint of the text model alone" in err
    assert not (tmp_path / "out").exists()
