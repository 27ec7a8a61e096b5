"""The benchmark of DPO steps runs, and what it writes is what it has measured."""

import argparse
import sys

import pytest
import torch
from support.paths import ROOT

pytest.importorskip("trl", minversion="1.16")
sys.path.append(str(ROOT / "benchmarks"))

import bench_preference
from record import load

ASKED = {
    "model": "Llama-3 8B",
    "prompt": 256,
    "completion": 32,
    "providers": None,
    "steps": 1,
    "rounds": 2,
    "commit": "abc",
    "tiny": True,
    "command": "python",
}


def test_providers_take_turns(tmp_path, monkeypatch):
    """Turns in this process, since three of them take longer to begin than to run."""
    args = argparse.Namespace(**ASKED, output=tmp_path / "found.json")
    turns = []

    def here(provider, argv):
        turns.append(provider)
        return bench_preference.turn(provider, args, torch.device("cpu"))

    monkeypatch.setattr(bench_preference, "in_a_process", here)
    rows = bench_preference.run(args, [], torch.device("cpu"))
    names = bench_preference.providers()
    assert turns == names * 2 and [row["provider"] for row in rows] == names
    assert {"trl", "lemo 0.3", "lemo 0.15"} <= set(names)
    header, written = load(args.output)
    assert written == rows and header["trl"] and header["commit"] == "abc"
    for row in rows:
        if row["provider"] == "trl+liger":  # it needs a GPU
            continue
        assert row["status"] == "ok" and row["rounds"] == 2 and row["ms_median"] > 0
        assert row["loss"] == pytest.approx(0.693, abs=0.05)


def test_a_turn_is_a_process_and_says_what_failed(tmp_path):
    found = bench_preference.in_a_process("lemo 2", ["--tiny", "--prompt", "64"])
    assert found["status"].startswith("failed: ValueError: retention must lie")
