"""Where in the row blocks are kept: against the sets of each pass, place by place."""

import html
import json
import random
import re
import shutil
from itertools import pairwise

import pytest
import torch
from support.reported import ROWS, make_trainer, record, train

from lemo_hf import LeMoConfig
from lemo_hf.report.page import write_report
from lemo_hf.report.places import (
    MOST_CURVES,
    MOST_MOMENTS,
    PLACES,
    add_moment,
    kept_places,
    mean_curves,
    moments_until,
)


def by_parts(kept, real):
    """Share of each place of one row, by dividing each real block into as many parts as there are
    places: each place then has a whole number of them."""
    parts = kept[real].float().repeat_interleave(PLACES)
    return parts.reshape(PLACES, -1).mean(1)


def ragged_rows():
    """Rows of 96 and 40 tokens with padding on the right, and of 56 with padding on the left."""
    ids = ROWS[0]["input_ids"]
    rows = []
    for start, end in ((0, 96), (0, 40), (40, 96)):
        mask = torch.zeros(96, dtype=torch.long)
        mask[start:end] = 1
        labels = ids.masked_fill(mask == 0, -100)
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return rows * 4


def test_places_of_blocks():
    """Fewer blocks than places, more, as many; holes in a row; a row of padding alone."""
    torch.manual_seed(0)
    for blocks in (1, 3, PLACES, PLACES + 1, 117):
        real = torch.rand(5, blocks) < 0.8
        real[0], real[1, 1:], real[4] = True, False, False
        real[1, 0] = True
        sets = (torch.rand(2, 5, blocks) < 0.4) & real
        found = kept_places(sets, real)
        for index, chosen in enumerate(sets):
            rows = [by_parts(chosen[i], real[i]) for i in range(5) if real[i].any()]
            assert torch.allclose(found[index], sum(rows), atol=1e-5), blocks


@pytest.mark.parametrize("agree", [True, False])
def test_what_training_kept(tmp_path, agree):
    """With rows of several lengths, accumulation, recomputation and MLPs with sets of their own."""
    config = LeMoConfig(
        policy="random" if agree else "pooled", retention=0.4, mlp_retention=0.6, block_size=8,
        dense_first_layers=1, agree_across_layers=agree, dense_finish=0.5, finish_retention=0.7,
    )  # fmt: skip
    if agree:
        config = LeMoConfig(policy="random", retention=0.4, block_size=8, dense_first_layers=1)
    arguments = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    trainer = make_trainer(tmp_path, config, steps=6, rows=ragged_rows(), **arguments)
    seen = []
    trainer.lemo.passes.tally.listeners.append(seen.append)
    trainer.train()
    assert len(seen) == 12
    values = record(tmp_path)
    assert values["place_layers"] == (None if agree else [1, 2, 3])
    assert [(x["first"], x["last"], x["rows"]) for x in values["moments"]] == [
        (1, 2, 8), (3, 4, 8), (5, 6, 8),
    ]  # fmt: skip
    for number, moment in enumerate(values["moments"]):
        passes = seen[4 * number : 4 * number + 4]
        for name in ("attention", "mlp"):
            for curve, layer in zip(moment[name], [1] if agree else [1, 2, 3], strict=True):
                rows = [
                    by_parts(kept, real)
                    for x in passes
                    for kept, real in zip(x.kept_blocks[layer, name], x.real_blocks, strict=True)
                ]
                assert curve == pytest.approx((sum(rows) / len(rows)).tolist(), abs=1e-4)
    means = [sum(moment["attention"][0]) / PLACES for moment in values["moments"]]
    assert agree or means[2] > means[0] + 0.1  # the finish keeps more
    assert agree == (values["moments"][0]["attention"] == values["moments"][0]["mlp"])
    sets = [set(map(tuple, x[name])) for x in values["moments"] for name in ("attention", "mlp")]
    assert agree == (max(map(len, sets)) == 1)  # else a curve could be another layer's


def test_training_is_the_same_without_the_page(tmp_path):
    found = []
    for page in (True, False):
        torch.manual_seed(0)
        config = LeMoConfig(policy="random", retention=0.4, block_size=8)
        trainer = make_trainer(tmp_path, config, logging_steps=1)
        if not page:
            trainer.callback_handler.callbacks.pop()
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        weights = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        found.append((losses, weights))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def made_up(rng, first, last, curves=1):
    values = [[round(rng.random(), 4) for _ in range(PLACES)] for _ in range(curves)]
    return {"first": first, "last": last, "rows": rng.randint(1, 9), "attention": values,
            "mlp": values}  # fmt: skip


@pytest.mark.parametrize("curves", [1, 32, pytest.param(126, marks=pytest.mark.soak)])
def test_a_long_run_has_few_moments(curves):
    rng = random.Random(0)
    every, moments = [made_up(rng, 5 * i + 1, 5 * i + 5, curves) for i in range(300)], []
    for moment in every:
        add_moment(moments, json.loads(json.dumps(moment)))
        assert len(moments) <= MOST_MOMENTS
        assert len(moments) * curves <= max(MOST_CURVES, 8 * curves)
    assert moments[0]["first"] == 1 and moments[-1]["last"] == 1500
    assert all(b["first"] == a["last"] + 1 for a, b in pairwise(moments))
    spans = [moment["last"] - moment["first"] + 1 for moment in moments]
    assert max(spans[:-1]) <= 4 * 1500 / len(moments)  # none swallows the run
    whole, ours = mean_curves(every, "attention"), mean_curves(moments, "attention")
    for curve, other in zip(whole, ours, strict=True):
        assert other == pytest.approx(curve, abs=1e-3)  # each merge rounds to four digits


def test_moments_of_a_run_that_goes_on():
    rng = random.Random(0)
    moments = [made_up(rng, 1, 10), made_up(rng, 11, 20), made_up(rng, 21, 30)]
    moments[1]["rows"] = 40
    assert moments_until(moments, 20) == moments[:2]
    cut = moments_until(moments, 14)
    assert cut[0] == moments[0] and len(cut) == 2
    assert cut[1] == {**moments[1], "last": 14, "rows": 16}
    assert moments_until(moments, 0) == []


def test_a_resumed_run_goes_on(tmp_path):
    config = LeMoConfig(policy="random", retention=0.4, block_size=8)
    settings = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    train(tmp_path, config, 6, **settings)
    before = record(tmp_path)["moments"]
    shutil.rmtree(tmp_path / "checkpoint-6")
    train(tmp_path, config, 6, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert record(tmp_path)["moments"] == before  # chance draws by step
    assert [(x["first"], x["last"]) for x in before] == [(i, i) for i in range(1, 7)]
    own = LeMoConfig(policy="pooled", agree_across_layers=False, block_size=8)
    train(tmp_path, own, 6, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert [x["first"] for x in record(tmp_path)["moments"]] == [4, 5, 6]  # with other curves


def test_the_figures(tmp_path):
    """What `recent` keeps of 12 blocks, the first and the last six, is dark in its place."""
    config = LeMoConfig(policy="recent", retention=0.5, block_size=8, dense_finish=0.5)
    train(tmp_path, config, 4)
    text = html.unescape((tmp_path / "report.html").read_text())
    places = text[text.index('id="places"') : text.index("<h2>Settings")]
    titles = re.findall("<title>(.*?)</title>", places)
    sparse = [title for title in titles if title.startswith("steps 1 to 2, ")]
    shares = {tuple(map(float, re.findall(r"[\d.]+", title)[2:])) for title in sparse}
    kept = {(start, end) for start, end, share in shares if share == 1}
    # Of 12 blocks the first covers 3 1/3 of 40 places, and the five before the last 20 cover half.
    assert kept == {(0.0, 0.075), (0.6, 1.0)}
    assert [title for title in titles if title.startswith("steps 3 to 4, ")] == [
        "steps 3 to 4, 0 to 1 of the row: 1.00"
    ]
    assert places.count("<svg") == 2 and "layer by layer" not in places
    assert "each sparse layer" in text
    whole = [title for title in titles if title.startswith("0.975 to 1 of the row")]
    assert whole == ["0.975 to 1 of the row: 1.00, mean 0.75"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("moments", {}, "moments of .* must be a list"),
        ("moments", [{"first": 1, "last": 2}], "row 1 .* must have a number 'rows'"),
        ("moments", [{"first": 3, "last": 2, "rows": 1}], "must have steps after those before"),
        ("place_layers", [0, "b"], "'place_layers' .* must be a list of layers"),
        ("place_layers", [0, 1], "'attention' of row 1 .* must be curves of shares"),
        ("environment", {"torch": 3}, "'torch' of 'environment' of .* must be an object"),
        ("environment", [], "'environment' of .* must be an object"),
        ("model", {"trained": 1.5}, "'trained' of 'model' of .* must be an integer"),
        ("sparse", 3, "'sparse' of .* must be text"),
    ],
)
def test_a_damaged_record(tmp_path, name, value, says):
    train(tmp_path, LeMoConfig(block_size=8), 2)
    (tmp_path / "lemo_report.json").write_text(json.dumps({**record(tmp_path), name: value}))
    with pytest.raises(ValueError, match=says):
        write_report(tmp_path)


def test_the_page_of_an_older_record(tmp_path):
    """Which had no moments."""
    train(tmp_path, LeMoConfig(block_size=8), 2)
    values = record(tmp_path)
    del values["moments"], values["place_layers"]
    (tmp_path / "lemo_report.json").write_text(json.dumps(values))
    assert 'id="places"' not in write_report(tmp_path).read_text()
