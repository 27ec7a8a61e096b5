"""The page of a run: it shows what was measured, needs nothing else, and runs nobody's text."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
import torch
from support.paths import DEMO
from support.reported import ROWS, make_trainer, record, train
from transformers import TrainerCallback

from lemo_hf import LeMoConfig, LeMoTrainer
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.report.figures import MOST_COLUMNS, heat_map
from lemo_hf.report.page import write_report


class Page(HTMLParser):
    """Tags, attributes that could fetch something, and text by the id around it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids |= {value for name, value in attrs if name == "id"}


def test_retention_by_layer_and_step(tmp_path):
    """Against the sets that the passes themselves report."""
    config = LeMoConfig(
        threshold=0.9, mlp_retention=0.5, block_size=8, dense_first_layers=1,
        agree_across_layers=False,
    )  # fmt: skip
    seen = []

    original = LeMoTrainer.training_step

    def step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        seen.append(
            {
                key: blocks.float().mean()
                for key, blocks in self.lemo.passes.tally.kept_blocks.items()
            }
        )
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeMoTrainer, "training_step", step)
        trainer = train(tmp_path, config, gradient_checkpointing=True)
    rows = record(tmp_path)["rows"]
    assert [row["step"] for row in rows] == [2, 4]
    for number, row in enumerate(rows):
        for name in ("attention", "mlp"):
            passes = seen[2 * number : 2 * number + 2]
            expected = [1.0] + [float(sum(sets[i, name] for sets in passes)) / 2 for i in (1, 2, 3)]
            assert row[name] == pytest.approx(expected)
    logged = [x["lemo/mlp_retention"] for x in trainer.state.log_history if "loss" in x]
    assert logged == pytest.approx([sum(row["mlp"]) / 4 for row in rows], abs=1e-3)


def test_padding_is_not_counted(tmp_path):
    ids = ROWS[0]["input_ids"]
    rows = []
    for tokens in (96, 40):
        mask = (torch.arange(96) < tokens).long()
        labels = ids.masked_fill(mask == 0, -100)
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    config = LeMoConfig(policy="recent", retention=0.5, block_size=8)
    train(tmp_path, config, 2, rows=rows * 2)
    (row,) = record(tmp_path)["rows"]
    blocks = 96 // 8 + 40 // 8
    assert row["attention"] == pytest.approx([(6 + 3) / blocks] * 4)


def test_the_page(tmp_path):
    config = LeMoConfig(
        policy="recent", retention=0.5, block_size=8, mlp_retention=0.25, recompute="full"
    )
    trainer = train(tmp_path, config, eval_strategy="steps", eval_steps=2)
    trainer.save_model()
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.ids == {"retention", "places", "settings", "environment"}
    assert page.tags.count("svg") == 6  # attention and MLP: trackers have the rest
    loss = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert f"last loss</span><b>{loss[-1]:,.4g}" in text and "evaluation loss" in text
    assert "layer 0, step 2 to 4: 0.50" in text
    assert "layer 3, step 2 to 4: 0.25" in text
    assert version("torch") in text and "mlp_retention" in text
    assert trainer.lemo.describe() in html.unescape(text)


def test_the_page_of_a_run_with_a_finish(tmp_path):
    trainer = train(tmp_path, LeMoConfig(block_size=8, dense_finish=0.5), logging_steps=1)
    logged = [x["lemo/mlp_retention"] for x in trainer.state.log_history if "loss" in x]
    assert logged == pytest.approx([1 / 3, 1 / 3, 1, 1])
    assert [row["mlp"] for row in record(tmp_path)["rows"]] == [
        pytest.approx([share] * 4) for share in logged
    ]
    text = html.unescape((tmp_path / "report.html").read_text())
    assert "layer 0, step 3 to 4: 1.00" in text and "The last 50% of the steps are dense." in text
    mean = re.search(r"mean retention\D+([\d.]+)", re.sub("<[^>]+>", " ", text))
    assert float(mean[1]) == pytest.approx(2 / 3, abs=1e-3)


def test_nothing_is_fetched_and_nothing_is_run(tmp_path):
    train(tmp_path, LeMoConfig(block_size=8), 2)
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    values = record(tmp_path)
    values["model"]["name"] = evil
    values["environment"]["versions"]["torch"] = evil
    (tmp_path / "lemo_report.json").write_text(json.dumps(values))
    (tmp_path / "lemo_train.yaml").write_text(f"model: {evil}")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    state["log_history"].append({"step": 3, "loss": float("nan")})
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    perplexity = {"perplexity": 3.0, "by_position": [], "model": evil}
    (tmp_path / "perplexity.json").write_text(json.dumps(perplexity))
    text = write_report(tmp_path).read_text()
    page = Page(text)
    assert html.unescape(text).count(evil) == 4
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "action", "data", "onerror"}
    assert "url(" not in text and "@import" not in text and not re.search(r"https?://", text)
    policies = [value for name, value in page.attributes if name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policies)


def test_a_resumed_run_goes_on(tmp_path):
    config = LeMoConfig(block_size=8)
    train(tmp_path, config, 6, save_strategy="steps", save_steps=3, logging_steps=1)
    before = record(tmp_path)["rows"]
    shutil.rmtree(tmp_path / "checkpoint-6")
    settings = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    train(tmp_path, config, 6, resume=str(tmp_path / "checkpoint-3"), **settings)
    after = record(tmp_path)["rows"]
    assert [row["step"] for row in after] == [1, 2, 3, 4, 5, 6]
    assert after[:3] == before[:3]
    train(tmp_path, config, 2, **settings)  # a new run begins anew
    assert [row["step"] for row in record(tmp_path)["rows"]] == [1, 2]


def test_a_run_after_one_that_failed_counts_once(tmp_path):
    """Whether the trainer is used again or `auto_find_batch_size` begins anew."""

    class BreaksOff(TrainerCallback):
        steps = 0

        def on_step_end(self, *_, **__):
            self.steps += 1
            if self.steps == 3:
                raise RuntimeError("CUDA out of memory.")

    for own in ({}, {"auto_find_batch_size": True}):
        config = LeMoConfig(block_size=8)
        trainer = make_trainer(tmp_path, config, callbacks=[BreaksOff()], **own)
        if not own:
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.train()
        trainer.train()
        assert [row["step"] for row in record(tmp_path)["rows"]] == [2, 4]
        assert len(trainer.lemo.passes.tally.listeners) == 0


@pytest.mark.parametrize("lemo_config", [None, LeMoConfig(block_size=8)])
@pytest.mark.parametrize("by_callback", [False, True])
def test_before_training(tmp_path, lemo_config, by_callback):
    """Trainer's methods may be called then, as without the callbacks."""
    more = [LeMoCallback(lemo_config)] if by_callback and lemo_config is not None else []
    trainer = make_trainer(tmp_path, None if by_callback else lemo_config, callbacks=more)
    trainer.log({"loss": 3.0})
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.log({"loss": 2.0})
    assert not (tmp_path / "lemo_report.json").exists()
    trainer.train()
    assert [row["step"] for row in record(tmp_path)["rows"]] == [2, 4]
    trainer.evaluate()


def test_dense_training_has_a_page_too(tmp_path):
    trainer = train(tmp_path, None)
    text = (tmp_path / "report.html").read_text()
    assert "The run was dense: every layer trained all tokens." in text
    assert "A dense training run, without LeMo." in text and "Not recorded" not in text
    assert f"{trainer.state.log_history[-2]['loss']:,.4g}" in text
    assert Page(text).tags.count("svg") == 0
    (tmp_path / "lemo_report.json").unlink()  # as of a run without the callback
    text = write_report(tmp_path).read_text()
    assert "Not recorded: train sparse with ReportCallback" in text and "A training run." in text


def test_a_run_that_got_lemo_late_is_not_called_dense(tmp_path):
    """Its log has what layers kept, though the record was begun before LeMo was on the model."""
    train(tmp_path, LeMoConfig(block_size=8))
    values = record(tmp_path) | {"lemo": None, "sparse": None, "rows": [], "moments": []}
    (tmp_path / "lemo_report.json").write_text(json.dumps(values))
    text = write_report(tmp_path).read_text()
    assert "Not recorded: train sparse" in text and "dense" not in text


def test_recall_and_evaluations(lemo, tmp_path):
    """What `lemo` writes elsewhere is found; the command renders a run without a callback."""
    trainer = train(
        tmp_path / "made", LeMoConfig(block_size=8), save_strategy="steps", save_steps=2
    )
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "made" / "checkpoint-4", run / "checkpoint-4")
    shutil.copy(DEMO / "predictor" / "lemo_config.json", run)
    cells = [{"length": 512, "depth": 0.5, "accuracy": 0.75, "samples": 4}]
    position = [{"first": 1, "last": 255, "loss": 2.0, "perplexity": 7.389, "tokens": 5}]
    (run / "bench").mkdir()
    for name, values in {
        "ppl.json": {"perplexity": 12.34, "by_position": position, "dataset": ["pg19"]},
        "needles.json": {"accuracy": 0.75, "cells": cells},
        "eval_results.json": trainer.evaluate(),
        "bench/result.json": {"hotpotqa": {"0-4k": 31.25, "8k+": 12.5}, "qasper": {"0-4k": 8.125}},
        "other.json": {"what": "is this"},
    }.items():
        (run / name).write_text(json.dumps(values))
    (run / "list.json").write_text("[1]")
    code, out, err = lemo("report", run, "--output", tmp_path / "page.html")
    assert code == 0 and "page.html" in out, err
    text = (tmp_path / "page.html").read_text()
    for expected in ("ppl.json", "12.34", "7.389", "needles.json", "0.75", "bench/result.json"):
        assert expected in text
    for expected in ("31.25", "8.125", "held-out books"):
        assert expected in text
    for other in ("eval_results.json", "other.json", "list.json"):
        assert other not in text
    table = json.loads((run / "lemo_config.json").read_text())["predictor"]["recall"]
    for row in table:
        assert f"<td>{row['recall']:.4g}</td>" in text
    code, _, err = lemo("report", tmp_path / "no")
    assert code == 2 and "there is no directory" in err
    (tmp_path / "empty").mkdir()
    code, _, err = lemo("report", tmp_path / "empty")
    assert code == 2 and "has neither trainer_state.json" in err and "Traceback" not in err


def test_many_steps_are_averaged():
    values = [[step % 2 for step in range(1000)], [0.5] * 1000]
    figure = str(heat_map(values, list(range(1000)), "step", "layer"))
    assert figure.count("<rect") == 2  # each layer's means are equal, so each is one run
    values = [[step / 1000 for step in range(1000)]]
    figure = str(heat_map(values, list(range(1000)), "step", "layer"))
    assert MOST_COLUMNS / 2 < figure.count("<rect") <= MOST_COLUMNS


# What a page that is shown says of itself.
PROBE = """
const box = x => x.getBoundingClientRect(), all = (x, what) => [...x.querySelectorAll(what)];
const seen = {outside: [], over: [], hovered: [], least: 99, figures: []};
for (const figure of all(document, 'svg')) {
  const f = box(figure), words = all(figure, 'text');
  seen.figures.push(Math.round(f.width));
  for (const word of words) {
    const a = box(word);
    seen.least = Math.min(seen.least, a.height);
    if (a.left < f.left || a.right > f.right || a.top < f.top || a.bottom > f.bottom)
      seen.outside.push(word.textContent);
    for (const other of words) {
      const b = box(other);
      if (word !== other && a.left < b.right && b.left < a.right && a.top < b.bottom - 3
          && b.top < a.bottom - 3) seen.over.push(word.textContent + other.textContent);
    }
  }
  const under = document.elementFromPoint(f.left + f.width / 2, f.top + f.height / 2);
  const title = under.querySelector('title');
  if (title) seen.hovered.push(title.textContent);
}
seen.scroll = document.documentElement.scrollWidth;
document.title = JSON.stringify(seen);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(tmp_path, width):
    """Laid out without overflow, in a frame as wide as a screen or a phone; no words of a figure
    lie over others or outside it, and what is under the mouse has a title."""
    config = LeMoConfig(
        block_size=8, mlp_retention=0.25, policy="pooled", agree_across_layers=False
    )
    train(tmp_path, config, 4)
    text = (tmp_path / "report.html").read_text()
    page = re.sub(r"<meta http-equiv[^>]+>", "", text)
    page = page.replace("</body>", f"<script>{PROBE}</script></body>")
    (tmp_path / "probe.html").write_text(page)
    frame = f'<iframe src=probe.html width={width} height=6000 onload="document.title='
    frame += 'this.contentDocument.title"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    options = (*options, "--window-size=1400,6000", "--virtual-time-budget=3000")
    found = subprocess.run(
        ["chromium", *options, "--dump-dom", f"file://{tmp_path}/frame.html"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", found.stdout)[1]))
    assert seen["scroll"] <= width
    assert len(seen["figures"]) == 8 and all(200 < size < width for size in seen["figures"])
    assert seen["least"] >= 12 and not seen["outside"] and not seen["over"]
    assert len(seen["hovered"]) == 8 and all(re.search(r": [01]\.\d\d", x) for x in seen["hovered"])
