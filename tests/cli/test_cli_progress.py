"""Commands show how much time is left, on stderr; with --json they show no bar of anybody's."""

import json
import re

import pytest
from support.dry_models import _poison  # noqa: F401
from support.paths import DEMO

from lemo_hf.progress import Estimated
from lemo_hf.tune.measure import LossRise

MODEL = DEMO / "model"
LEFT = re.compile(r"(\w[\w ]*): +\d+%\|.*?(\d+)/(\d+) \[[\d:]+<[\d:]+")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((DEMO / "text" / "train-alice-adams.txt").read_text()[:6000])
    return path


def commands(text, folder):
    model = ("--model", MODEL)
    rows = ("--dataset", text, "--tokens", 256, "--rows", 2)
    thresholds = ("--retention", 0.5, "--block-size", 32, "--output", folder / "thresholds")
    return {
        "perplexity": ("eval", "perplexity", *model, "--dataset", text, "--max-length", 256),
        "passes over the rows": ("calibrate", *model, *rows, *thresholds),
        "planned steps": ("plan", *model, "--tokens", 256),
    }


@pytest.mark.parametrize("name", ["perplexity", "passes over the rows", "planned steps"])
def test_time_left_and_none_with_json(lemo, tmp_path, text, name, monkeypatch):
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    command = commands(text, tmp_path)[name]
    measured = []
    run = LossRise.__call__
    monkeypatch.setattr(
        LossRise, "__call__", lambda self, config: measured.append(1) or run(self, config)
    )
    code, _, err = lemo(*command)
    assert code == 0, err
    found = [match.groups() for match in LEFT.finditer(err.replace("\r", "\n"))]
    bars = [(int(done), int(total)) for bar, done, total in found if bar == name]
    assert bars and all(done <= total for done, total in bars)
    assert bars[-1][0] == bars[-1][1] > 1  # what was done is all
    if measured:
        assert bars[-1][0] == len(measured) + 1  # and the dense model's pass
    if name == "perplexity":  # others are asked for JSON by their own tests
        code, out, err = lemo(*command, "--json")
        assert code == 0 and json.loads(out), err
        assert "%|" not in err and "it/s" not in err


def test_a_guess_is_never_reached_before_the_end(capsys):
    with Estimated(desc="guess") as bar:
        bar.expect(2)
        for done in range(1, 6):
            bar.update()
            assert bar.n == done < bar.total
        bar.expect(10)
        assert bar.total == 15
    assert bar.total == bar.n == 5
    with Estimated(disable=True) as hidden:
        hidden.expect(3)
        hidden.update()
    assert "guess" in capsys.readouterr().err
