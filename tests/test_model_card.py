"""The model card of predictors."""

from hub_client import make_predictor
from huggingface_hub import ModelCard
from models import make_model

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.predictors.base_model import BaseModel


def test_the_card_says_what_was_measured(tmp_path):
    model = make_model("llama")
    model.config._name_or_path, model.config._commit_hash = "org/base", "c" * 40
    row = {"documents": "books", "layer": 1, "retention": 0.3}
    recall = [
        {**row, "policy": "predictor", "recall": 0.91237},
        {**row, "policy": "random", "recall": 0.5},
    ]
    base = BaseModel.of_model(model)
    predictor = make_predictor(
        dense=[0],
        base=base,
        recall=recall,
        training={
            "datasets": ["org/books", "/local/text"],
            "command": "lemo train-predictor --model org/base",
            "tokens": 1_000_000,
        },
    )
    predictor.save_pretrained(tmp_path / "card", repo_id="me/it")
    card = ModelCard.load(tmp_path / "card" / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "lemo-hf" and card.data.base_model == "org/base"
    assert card.data.datasets == ["org/books"]
    assert {"lemo-hf", "lemo-predictor"} <= set(card.data.tags)  # by which "auto" finds it
    text = card.text
    assert "| documents | retention | layer | predictor | random |" in text
    assert "| books | 0.3 | 1 | 0.912 | 0.500 |" in text
    assert "| tokens | 1,000,000 |" in text and f"Weights: `{base.fingerprint[:16]}`" in text
    assert "lemo train-predictor --model org/base\n```" in text and 'predictor="me/it"' in text
    for layer in (1, 2):
        parameters = sum(p.numel() for p in predictor.layers[layer].parameters())
        assert f"| {layer} | {parameters:,} |" in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    line = code.split("lemo_config = ")[1].split("\n")[0]
    config = eval(line.replace("me/it", str(tmp_path / "card")))
    assert config.block_size == 8 and config.dense_first_layers == 1
    apply_lemo(model, config)
    own = text.split("Settings of your own: `")[1].split("`")[0]
    assert eval(own.replace("...", "dense_first_layers=1")).predictor == "me/it"
    assert isinstance(config, LeMoConfig)


def test_a_card_without_measurements_has_no_numbers(tmp_path):
    make_predictor(dense=[0]).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and card.data.datasets is None
    assert "Not measured." in card.text and "bash" not in card.text
