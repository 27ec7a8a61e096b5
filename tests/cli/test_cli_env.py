"""`lemo env`, and how soon the command answers."""

import json
import os
import platform
import re
import resource
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


def cpu_seconds():
    """Of processes that have ended: what others do on this machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_names_every_command_and_is_quick():
    times = []
    for _ in range(3):
        began = cpu_seconds()
        ended = subprocess.run(
            [sys.executable, "-m", "lemo_hf.cli", "--help"],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "120"},
            capture_output=True,
            text=True,
            check=True,
        )
        times.append(cpu_seconds() - began)
    for command in ("train", "train-predictor", "calibrate", "eval", "plan", "inspect", "report",
                    "merge", "env"):  # fmt: skip
        assert re.search(rf"\b{command}\b  ", ended.stdout), command
    assert min(times) < 0.5, times
