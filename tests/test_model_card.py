"""The model card, and what recall decides."""

import pytest
from hub_client import make_predictor
from huggingface_hub import ModelCard
from models import make_model

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.predictors.base_model import BaseModel


def test_the_card_says_what_was_measured(tmp_path):
    config = make_model("llama").config
    config._name_or_path, config._commit_hash = "org/base", "c" * 40
    row = {"documents": "books", "head": "attention", "retention": 0.5, "least": 0.5, "layers": []}
    recall = [
        {**row, "policy": "predictor", "mean": 0.91237},
        {**row, "policy": "random", "mean": 0.5},
    ]
    predictor = make_predictor(
        dense=[0],
        base=BaseModel.from_config(config),
        recall=recall,
        training={
            "datasets": ["org/books", "/local/text"],
            "command": "lemo train-predictor --model org/base",
            "tokens": 1_000_000,
            "pruned": {"attention": [None, 0.25, 0.5, 0]},
        },
    )
    (tmp_path / "plot.png").write_bytes(b"picture")
    predictor.save_pretrained(tmp_path / "card", plot=tmp_path / "plot.png", repo_id="me/it")
    card = ModelCard.load(tmp_path / "card" / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "lemo-hf" and card.data.base_model == "org/base"
    assert card.data.datasets == ["org/books"] and "lemo" in card.data.tags
    text = card.text
    assert "| documents | head | retention | predictor | random |" in text
    assert "| books | attention | 0.5 | 0.912 (0.500) | 0.500 (0.500) |" in text
    assert "| tokens | 1,000,000 |" in text
    assert "lemo train-predictor --model org/base\n```" in text
    assert "![Recall](recall.png)" in text and 'predictor="me/it"' in text
    assert (tmp_path / "card" / "recall.png").read_bytes() == b"picture"
    for layer, share in ((1, "25.0%"), (2, "50.0%")):
        parameters = sum(p.numel() for p in predictor.attention[layer].parameters())
        assert f"| {layer} | {parameters:,} | {share} |" in text
    assert "| 0 | none |  |" in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    line = code.split("lemo_config = ")[1].split("\n")[0]
    config = eval(line.replace("me/it", str(tmp_path / "card")))
    assert config.block_size == 8
    apply_lemo(make_model("llama"), config)
    own = text.split("Settings of your own: `")[1].split("`")[0]
    assert eval(own.replace("...", "dense_first_layers=1")).predictor == "me/it"


def test_weak_layers_are_left_out(tmp_path):
    def row(documents, head, policy, layers):
        facts = {"documents": documents, "head": head, "policy": policy, "retention": 0.5}
        return {**facts, "mean": 0.9, "least": min(layers), "layers": layers}

    recall = [
        row("books", "attention", "predictor", [0.8, 0.95, 0.97, 0.96]),
        row("code", "attention", "predictor", [0.99, 0.95, 0.89, 0.96]),
        row("code", "attention", "random", [0.5, 0.5, 0.5, 0.5]),
        row("code", "mlp", "predictor", [0.9, 0.9, 0.9, 0.5]),
    ]
    predictor = make_predictor(mlp=True, recall=recall)
    weak = predictor.weak_layers(0.9)
    assert weak == {"attention": [0, 2], "mlp": [3]}
    assert predictor.weak_layers(0.5) == {"attention": [], "mlp": []}
    less = predictor.without(weak)
    assert [network is None for network in less.attention] == [True, False, True, False]
    assert [network is None for network in less.mlp] == [False, False, False, True]
    assert less.attention[1] is predictor.attention[1] and less.weak_layers(0.9)["mlp"] == []
    assert less.recommended.dense_first_layers == 1
    less.save_pretrained(tmp_path)
    lemo = apply_lemo(make_model("llama"), LeMoConfig.from_pretrained(tmp_path))
    assert lemo.rules[0] is None and lemo.predictor.same_as(less)
    with pytest.raises(ValueError, match=r"at retention 0.3 was not measured \(measured: \[0.5\]"):
        predictor.weak_layers(0.9, retention=0.3)
    with pytest.raises(ValueError, match="None for .* but not for all"):
        predictor.without({"attention": [0, 1, 2, 3]})


def test_a_card_without_measurements_has_no_numbers(tmp_path):
    make_predictor(dense=[0]).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and card.data.datasets is None
    assert "Not measured." in card.text and "pruned" not in card.text
    assert "recall.png" not in card.text and "bash" not in card.text
