"""The model card of predictors."""

import ast
import dataclasses
import html
import re

import markdown
import pytest
from huggingface_hub import ModelCard
from support.hub_client import BASE, make_predictor
from support.models import make_model

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


EVIL = "<script>alert(1)</script> `<b>`` [x](http://y) ![z](w) a|b\n# c\\|"


def test_names_stay_names(tmp_path):
    """As a browser shows the card: no tag, link or heading of theirs, and their text as it is."""
    row = {"documents": EVIL, "layer": 1, "retention": 0.3, "policy": EVIL, "recall": 0.5}
    base = dataclasses.replace(BASE, name=EVIL, model_type="llama`x", commit="<i>")
    training = {"datasets": [EVIL, "org/books"], "command": f"a\n```\n{EVIL}", EVIL: EVIL}
    predictor = make_predictor(dense=[0], base=base, recall=[row], training=training)
    predictor.save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    page = markdown.markdown(text, extensions=["tables", "fenced_code"])
    tags = set(re.findall(r"<(\w+)", page))
    known = {"a", "code", "h1", "h2", "p", "pre", "table", "tbody", "td", "th", "thead", "tr"}
    assert tags <= known
    assert re.findall(r'href="([^"]*)"', page) == ["https://arxiv.org/abs/2501.09767"]
    assert page.count("<h1>") == 1 and page.count("<h2>") == 3
    cells = html.unescape(page)
    assert cells.count("<script>alert(1)</script>") >= 6
    for line in page.split("<tbody>")[1].split("</tbody>")[0].split("</tr>")[:-1]:
        assert line.count("<td") == 4


@pytest.mark.parametrize("name", ['a"); import os; ("', "a\\", "a\nb", "é😀", "a```b`c", "'"])
def test_a_repository_is_a_string_of_the_example(name, tmp_path):
    make_predictor(dense=[0]).save_pretrained(tmp_path, repo_id=name)
    text = ModelCard.load(tmp_path / "README.md").text
    fence, code = re.search(r"(`{3,})python\n(.*?)\n\1\n", text, re.DOTALL).groups()
    tree = ast.parse(code)
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert strings == [name] and len(tree.body) == 4 and fence not in code
    ticks, own = re.search(r"Settings of your own: (`+) ?(.*?) ?\1\.", text).groups()
    call = ast.parse(own.replace(", ...", "")).body[0].value
    assert call.keywords[0].value.value == name and ticks not in own


def test_a_card_of_the_users_is_not_replaced(tmp_path, caplog):
    card = tmp_path / "README.md"
    card.write_bytes(b"# My model\n\xff")
    make_predictor(dense=[0]).save_pretrained(tmp_path)
    assert card.read_bytes() == b"# My model\n\xff"
    assert "README.md is no card of a predictor: it stays as it is" in caplog.text
    card.unlink()
    make_predictor(dense=[0]).save_pretrained(tmp_path, repo_id="me/first")
    with card.open("a") as file:
        file.write("\nMy notes.\n")
    make_predictor(dense=[0]).save_pretrained(tmp_path, repo_id="me/second")
    text = card.read_text()
    assert "me/second" in text and "me/first" not in text and text.endswith("\n\nMy notes.\n")
    assert text.count("Written by lemo-hf") == 1
