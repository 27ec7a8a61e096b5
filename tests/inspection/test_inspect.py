"""`lemo inspect`: its numbers are those of the model's own passes, its pictures show them."""

import json

import pytest
import torch
from matplotlib.image import imread
from support.hub_client import BASE, make_predictor
from support.inspected import IDS, training_pass
from support.models import make_model, with_lora
from support.paths import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf import LeMoConfig
from lemo_hf.core.observe import observe
from lemo_hf.core.policies import POLICIES
from lemo_hf.inspection.layer_plots import (
    informativeness_figure,
    kept_figure,
    retention_figure,
    sparsity_figure,
)
from lemo_hf.inspection.layers import SMALL, inspect_text


@pytest.mark.parametrize(
    "config",
    [
        LeMoConfig(block_size=8, policy="pooled", dense_first_layers=1),
        LeMoConfig(block_size=8, retention=0.3, policy="oracle", agree_across_layers=False),
        LeMoConfig(block_size=16, threshold=0.9, mlp_retention=0.6, agree_across_layers=False),
        LeMoConfig(block_size=8, policy="random", recompute="full", offload_gib=1),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_kept_is_what_a_training_pass_keeps(config, lora):
    model = make_model("llama")
    model = with_lora(model) if lora else model
    model.train()
    found = inspect_text(model, IDS, config, progress=False)
    assert model.training and not hasattr(model, "_lemo")
    expected = training_pass(model, config, IDS)
    blocks = -(-len(IDS) // config.block_size)
    for name in ("attention", "mlp"):
        for layer, kept in enumerate(found.kept[name]):
            assert kept == expected.get((layer, name), [True] * blocks)
            assert found.retention[name][layer] == sum(kept) / blocks
    assert any(not all(kept) for kept in found.kept["attention"])


def oracle_scores(model, config, ids):
    """The paper's score of each layer's blocks, in a dense pass."""
    scores = []
    see = scores.append
    observe(model, config, torch.tensor([ids]), lambda inputs: see(POLICIES["oracle"](inputs)[0]))
    return scores


def test_informativeness_recall_and_sparsity():
    model = make_model("llama").eval()
    config = LeMoConfig(block_size=8, policy="oracle", agree_across_layers=False)
    found = inspect_text(model, IDS, config, lengths=[64], progress=False)
    assert list(found.sparsity) == [64, 150]
    for length, shares in found.sparsity.items():
        scores = oracle_scores(model, config, IDS[:length])
        for layer, row in enumerate(scores):
            small = [x < SMALL * row.max() for x in row]
            assert shares[layer] == pytest.approx(sum(small).item() / len(small))
    torch.testing.assert_close(torch.tensor(found.informativeness), torch.stack(scores))
    assert found.recall == [1.0] * 4  # the oracle finds all of its own
    random = inspect_text(model, IDS, LeMoConfig(block_size=8, policy="random"), progress=False)
    assert all(0 < share < 1 for share in random.recall)


def test_predictors(tmp_path):
    predictor = make_predictor(dense=[0])
    predictor.save_pretrained(tmp_path)
    config = LeMoConfig(block_size=8, predictor=str(tmp_path), dense_first_layers=1)
    model = make_model("llama")
    assert BASE.num_hidden_layers == 4
    found = inspect_text(model, IDS, config, progress=False)
    assert found.recall[0] is None and all(0 < share <= 1 for share in found.recall[1:])
    assert found.kept["attention"][1] == training_pass(model, config, IDS)[1, "attention"]


def test_what_cannot_be_inspected():
    model = make_model("llama")
    with pytest.raises(ValueError, match="has 5 tokens, fewer than two blocks of 64"):
        inspect_text(model, IDS[:5], LeMoConfig(), progress=False)
    with pytest.raises(ValueError, match="got 10"):
        inspect_text(model, IDS, LeMoConfig(block_size=8), lengths=[10], progress=False)
    with pytest.raises(ValueError, match="leave no sparse layer"):
        inspect_text(model, IDS, LeMoConfig(block_size=8, dense_first_layers=4), progress=False)


def test_figures():
    config = LeMoConfig(block_size=16, retention=0.5, mlp_retention=0.25)
    found = inspect_text(make_model("llama"), IDS, config, lengths=[48, 96], progress=False)
    (mesh,) = informativeness_figure(found).axes[0].collections
    rows = torch.tensor(found.informativeness)
    shares = rows / rows.amax(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(mesh.get_array().tolist()), shares)
    bars = [
        [bar.get_height() for bar in group] for group in retention_figure(found).axes[0].containers
    ]
    assert bars == [found.retention["attention"], found.retention["mlp"]]
    panels = kept_figure(found).axes
    assert len(panels) == 2
    for axis, name in zip(panels, ("attention", "mlp"), strict=True):
        (mesh,) = axis.collections
        assert mesh.get_array().tolist() == found.kept[name]
    (line,) = sparsity_figure(found).axes[0].lines
    assert list(line.get_xdata()) == [48, 96, 150]
    means = [sum(layers) / 4 for layers in found.sparsity.values()]
    assert list(line.get_ydata()) == pytest.approx(means)


def test_the_command(lemo, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text((DEMO / "text" / "heldout-oh-money-money.txt").read_text()[5000:12000])
    shared = ("inspect", "--model", DEMO / "model", "--text", text, "--dtype", "float32")
    shared = (*shared, "--tokens", 512, "--config", DEMO / "predictor")
    code, out, err = lemo(*shared, "--output", tmp_path / "pictures")
    assert code == 0, err
    assert "tokens:" in out and "passes" in err
    for name in ("informativeness", "retention", "kept_blocks", "sparsity", "kept"):
        picture = imread(tmp_path / "pictures" / f"{name}.png")
        assert picture.shape[1] > 700 and picture.std() > 0.05
        assert f"{name}.png" in out
    code, out, err = lemo(*shared, "--json")
    assert code == 0, err
    found = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(DEMO / "model")(text.read_text())["input_ids"][:512]
    config = LeMoConfig.from_pretrained(DEMO / "predictor")
    assert config.policy == "predictor"
    expected = training_pass(model, LeMoConfig.from_dict(found["config"]), ids)
    dense = [True] * 8  # layers before the predictor's
    kept = [expected.get((i, "attention"), dense) for i in range(10)]
    assert found["kept"]["attention"] == kept and not all(map(all, kept))
    for more, message in (
        ((), "give --output DIR"),
        (("--json", "--tokens", 10**6), "--tokens 1000000"),
        (("--json", "--policy", "best"), "policy must be one of"),
        (("--json", "--text", tmp_path / "none.txt"), "there is no such file"),
    ):
        code, _, err = lemo(*shared, *more)
        assert code == 2 and message in err and "Traceback" not in err
