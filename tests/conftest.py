"""Seeds, poison, and kernels that run where there is no GPU."""

import gc
import logging
import os
import sys

import torch

# Before anything imports triton or the Hub client.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from lemo_hf.kernels.launch import DEVICES

# PyTorch notes at first use which functions a device context reaches: before `_poison` does.
with torch.device("meta"):
    torch.empty(0)


# A file is one process's. Begun at the end, one of these leaves the other without work.
LONG = {
    "test_benchmarks_quality.py",
    "test_ddp.py",
    "test_examples.py",
    "test_fsdp_trainer.py",
    "test_sequence_parallel.py",
    "test_trainer.py",
    "test_trl.py",
    "test_trl_dpo.py",
}


@pytest.hookimpl(tryfirst=True)  # -m selects by marks
def pytest_collection_modifyitems(items):
    """Long files first. GPU tests need a GPU; everywhere else they are shown as skipped."""
    items.sort(key=lambda item: item.path.name not in LONG)
    gpu = torch.cuda.is_available()
    for item in items:
        if gpu and launches_kernels(item):
            item.add_marker(pytest.mark.gpu)
        elif not gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def launches_kernels(item):
    """Whether a test runs by kernels, which a GPU compiles where there is one."""
    given = getattr(item, "callspec", None)
    by_kernel = given is not None and given.params.get("device") == "kernel"
    return by_kernel or "kernels_on" in getattr(item, "fixturenames", ())


def pytest_collection_finish():
    """Trainer collects garbage before it trains: let it not look through all that is imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else nanobind reports it as leaked


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_log_level():
    """What a run sets by `TrainingArguments(log_level=...)` is not the next test's."""
    yield
    logging.getLogger("lemo_hf").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _own_precision():
    """`TrainingArguments(torch_compile=True)` takes TF32 for the process, by two settings."""
    before, of_products = torch.backends.fp32_precision, torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(of_products)
    torch.backends.fp32_precision = before


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch):
    """Trainer in one process takes all GPUs that it sees; tests of several launch processes."""
    count = min(torch.cuda.device_count(), 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that nobody has written reads as NaN, so that a missed element is seen."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            out = _original(*args, **kwargs)
            if out.is_floating_point() and not out.is_meta:
                out.detach().fill_(float("nan"))
            return out

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(params=["reference", "kernel"])
def device(request, monkeypatch):
    """Where a test of a kernel runs: on the CPU by its definition, and by its kernel.

    The kernel runs on the GPU, or in Triton's interpreter where there is none.
    """
    if request.param == "reference":
        return torch.device("cpu")
    return kernel_device(monkeypatch)


def kernel_device(monkeypatch):
    """The GPU, or the CPU with kernels in Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setattr("lemo_hf.kernels.launch.DEVICES", DEVICES | {"cpu"})
    return torch.device("cpu")


@pytest.fixture
def kernels_on(monkeypatch):
    """`kernel_device`, for tests of kernels alone."""
    return kernel_device(monkeypatch)


@pytest.fixture
def lemo(monkeypatch, capsys):
    """Runs the command: exit code, what it printed, and what it said of errors."""

    from lemo_hf.cli.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lemo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run
