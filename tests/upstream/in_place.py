"""A pytest plugin: our trainer in place of theirs, and a line of JSON on what each test did.

The same seed is set before every test, so that trainings can be compared number by number.
"""

import ast
import functools
import importlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import transformers

from lemo_hf import LeMoConfig, LeMoTrainer

CLASSES = ("transformers.Trainer", "trl.SFTTrainer", "trl.DPOTrainer")
SMALL = 1e-3  # of a test's learning rate, in gentle trainings
# Clocks and memory, and what our trainer adds.
_NOT_COMPARED = ("runtime", "per_second", "mem_", "total_flos", "lemo/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lemo-class", choices=CLASSES, help="the class that is replaced")
    parser.addoption("--lemo-mode", help="stock, none, or a retention")
    parser.addoption("--lemo-record", type=Path, help="file that gets a line of JSON a test")
    parser.addoption("--lemo-limit", type=int, help="seconds a test may take")
    parser.addoption("--lemo-gentle", action="store_true", help="fp32, small steps")


def pytest_configure(config: pytest.Config) -> None:
    for folder in {Path(arg.split("::")[0]).parent for arg in config.args}:
        for path in folder.glob("*.py"):
            _fill_names(path)
    plugin = InPlace(config.getoption("--lemo-record"), config.getoption("--lemo-limit"))
    plugin.watch_trainings()
    if config.getoption("--lemo-gentle"):
        _be_gentle()
    mode = config.getoption("--lemo-mode")
    if mode != "stock":
        plugin.replace(config.getoption("--lemo-class"), None if mode == "none" else float(mode))
    config.pluginmanager.register(plugin)


class InPlace:
    """What the current test did; written when it ends.

    Args:
        record: File to append to.
        limit: Seconds that a test, or what is set up for it, may take.
    """

    def __init__(self, record: Path, limit: int):
        self.record, self.limit = record, limit
        self.did: dict[str, Any] = {}

    def watch_trainings(self) -> None:
        """Note the figures of every training, also of the stock trainer."""
        plain, plain_step = transformers.Trainer.train, transformers.Trainer.training_step
        losses: list[float] = []
        kept: list[float] = []

        @functools.wraps(plain)
        def train(trainer: transformers.Trainer, *args: Any, **kwargs: Any) -> Any:
            losses.clear()
            kept.clear()
            result = plain(trainer, *args, **kwargs)
            lemo = getattr(trainer, "lemo", None) is not None
            figures = _figures(trainer, losses)
            found = {"lemo": lemo, "figures": figures, "kept": min(kept, default=None)}
            self.did["trainings"].append(found)
            return result

        @functools.wraps(plain_step)
        def training_step(trainer: transformers.Trainer, *args: Any, **kwargs: Any) -> Any:
            loss = plain_step(trainer, *args, **kwargs)
            losses.append(float(loss))
            report = {} if getattr(trainer, "lemo", None) is None else trainer.lemo.report()
            if report:
                kept.append(report["attention_retention"])
            return loss

        transformers.Trainer.train = train
        transformers.Trainer.training_step = training_step

    def replace(self, name: str, retention: float | None) -> None:
        """Put our class where test files import ``name`` from.

        A model or an argument that LeMo refuses is noted, and trained by our class without LeMo.
        """
        did, theirs = self.did, name.rpartition(".")
        ours: Any = LeMoTrainer
        if name == "trl.SFTTrainer":
            ours = importlib.import_module("lemo_hf.integrations.trl").LeMoSFTTrainer
        if name == "trl.DPOTrainer":
            ours = importlib.import_module("lemo_hf.integrations.trl_dpo").LeMoDPOTrainer
        config = None
        if retention is not None:  # rows of these tests are short
            config = LeMoConfig(retention=retention, block_size=4, chunk_size=8)

        class Ours(ours):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, lemo_config=config, **kwargs)

            def _apply_lemo(self, *args: Any, **kwargs: Any) -> Any:
                try:
                    return super()._apply_lemo(*args, **kwargs)
                except ValueError as refusal:
                    did["refused"].append(str(refusal))
                    self.lemo_config = None
                    return None

        Ours.__name__ = Ours.__qualname__ = theirs[2]
        setattr(importlib.import_module(theirs[0]), theirs[2], Ours)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.did.update(outcome="passed", message="", seconds=0.0, trainings=[], refused=[])
        result = yield
        test = f"{item.path.name}::{item.nodeid.partition('::')[2]}"
        with self.record.open("a") as file:
            file.write(json.dumps({"test": test, **self.did}) + "\n")
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        transformers.set_seed(0)
        with limited(self.limit):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with limited(self.limit):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.did["seconds"] += report.duration
        if report.outcome != "passed" and self.did["outcome"] != "failed":
            self.did["outcome"] = report.outcome
            crash = getattr(report.longrepr, "reprcrash", None)
            self.did["message"] = str(crash.message if crash else report.longrepr)[:400]


def _be_gentle() -> None:
    """Train in fp32 and by small steps: what rounding makes of later figures stays small."""
    plain = transformers.TrainingArguments.__post_init__

    @functools.wraps(plain)
    def gentle(args: transformers.TrainingArguments) -> None:
        args.bf16 = args.fp16 = False
        args.learning_rate *= SMALL
        plain(args)

    transformers.TrainingArguments.__post_init__ = gentle


def _figures(trainer: transformers.Trainer, losses: list[float]) -> list[float | None]:
    """The loss of every step, all numbers in the trainer's log, and the sum of the parameters."""
    logged = [
        float(value)
        for entry in trainer.state.log_history
        for key, value in entry.items()
        if isinstance(value, int | float) and not any(part in key for part in _NOT_COMPARED)
    ]
    total = sum(parameter.double().sum().item() for parameter in trainer.model.parameters())
    return [value if math.isfinite(value) else None for value in [*losses, *logged, total]]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _fill_names(path: Path) -> None:
    """Let a test file of another version be imported: names that are gone fail where used."""
    for node in ast.walk(ast.parse(path.read_text())):
        root = (getattr(node, "module", None) or "").split(".")[0]
        if (
            not isinstance(node, ast.ImportFrom)
            or node.level
            or root not in ("transformers", "trl")
        ):
            continue
        try:
            module = importlib.import_module(node.module or "")
        except ImportError:
            continue
        for name in (alias.name for alias in node.names):
            if not hasattr(module, name):
                setattr(module, name, _gone(f"{node.module}.{name}"))


def _gone(name: str) -> Callable[..., Any]:
    def gone(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the installed version has no {name}")

    return gone
