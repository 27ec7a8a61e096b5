"""`lemo env`, and what `lemo --help` loads."""

import json
import os
import platform
import re
import subprocess
import sys

import torch
import transformers
from support.paths import ROOT

from lemo_hf import __version__


def test_env(lemo, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, err = lemo("env", "--json")
    assert code == 0, err
    found = json.loads(out)
    versions = found["versions"]
    assert versions["lemo-hf"] == __version__ and versions["python"] == platform.python_version()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["transformers"] == transformers.__version__
    assert len(found["machine"]["gpus"]) == torch.cuda.device_count()
    assert bool(found["kernels"]["attention, fastest first"]) == torch.cuda.is_available()
    assert found["variables"]["OMP_NUM_THREADS"] == "1" and "hf_secret" not in out
    code, out, _ = lemo("env")
    assert code == 0 and f"- versions, lemo-hf: {__version__}\n" in out


def test_help_names_every_command_and_loads_nothing_large():
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lemo_hf.cli", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.split("|")[-1].strip() for line in ended.stderr.splitlines()}
    assert "typer" in loaded
    large = ("torch", "transformers", "datasets", "accelerate", "matplotlib")
    assert not loaded.intersection(large)
    for command in ("train", "train-predictor", "calibrate", "eval", "plan", "inspect", "report",
                    "merge", "env"):  # fmt: skip
        assert re.search(rf"\b{command}\b  ", ended.stdout), command
