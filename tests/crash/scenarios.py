"""What is killed: the work, how a user goes on, and what must come of it."""

import json
import os
import shutil
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from crash.children import Ended
from safetensors.torch import load_file
from support.models import save_tiny
from support.paths import DEMO

from lemo_hf import LeMoPredictor
from lemo_hf.cli.app import main
from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.predictors.predictor_set import PredictorInfo

TEXT = (DEMO / "text" / "train-alice-adams.txt").read_text()[:12_000]


def lemo(*arguments: Any) -> int:
    """Runs the command; its exit code."""
    sys.argv = ["lemo", *map(str, arguments)]
    try:
        main()
    except SystemExit as error:
        return error.code or 0
    return 0


def make_inputs(folder: Path) -> None:
    """A tiny model, a text and LongBench rows."""
    save_tiny(folder / "model", intermediate_size=64, max_position_embeddings=256)
    (folder / "book.txt").write_text(TEXT)
    (folder / "data").mkdir()
    rows = [
        {"input": "Who?", "context": TEXT[100 * i :][:400], "answers": [str(i)], "length": 60}
        | {"dataset": "passage_count", "language": "en", "all_classes": None, "_id": str(i)}
        for i in range(6)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "passage_count.jsonl").write_text(lines)


class Scenario:
    """Work whose output directory is ``out``, from inputs that lie elsewhere."""

    is_command = True

    def __init__(self, inputs: Path):
        self.inputs = inputs

    def prepare(self, out: Path) -> None:
        """What lies there before the work."""

    def work(self, out: Path) -> int:
        """What is killed."""
        raise NotImplementedError

    def go_on(self, out: Path) -> int:
        """What a user does then."""
        return self.work(out)

    def result(self, out: Path) -> Any:
        """What must be the same as without a kill."""
        raise NotImplementedError

    def told(self, ended: Ended) -> str | None:
        """What is wrong with what was printed when the disk was full."""

    def check(self, out: Path) -> None:
        """Raises if what a kill left is wrong before anybody goes on."""


class Train(Scenario):
    """`lemo train`: LoRA, a checkpoint every other step, an evaluation at the end."""

    def work(self, out, *more):
        small = ("--tokens", 64, "--lora.r", 2, "--lora.target_modules", "all-linear")
        how = {
            "max_steps": 6,
            "save_steps": 2,
            "save_total_limit": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
        }
        lists = [x for name, value in how.items() for x in (f"--training.{name}", value)]
        lemo_options = ("--lemo.block_size", 8, "--retention", 0.5, "--lemo.policy", "random")
        evaluated = ("--data.eval_dataset", self.inputs / "book.txt", "--data.max_eval_rows", 1)
        data = ("--model", self.inputs / "model", "--dataset", self.inputs / "book.txt")
        given = (*data, *small, *lists, *lemo_options, *evaluated, "--output", out)
        return lemo("train", *given, "--report", "--json", *more)

    def go_on(self, out):
        code = self.work(out, "--resume")
        if code == 2:  # it had no whole checkpoint
            code = self.work(out, "--overwrite")
        return code

    def result(self, out):
        metrics = json.loads((out / "all_results.json").read_text())
        state = json.loads((out / "trainer_state.json").read_text())
        losses = [line["loss"] for line in state["log_history"] if "loss" in line]
        tensors = load_file(out / "adapter_model.safetensors")
        settings = (out / "lemo_train.yaml").read_text().replace(str(out), "OUT")
        return {**tensors, "eval": metrics["eval_loss"], "losses": losses, "yaml": settings}

    def check(self, out):
        for path in [out, *out.glob("checkpoint-*")]:
            if (path / "adapter_model.safetensors").exists():
                assert (path / "lemo_train.yaml").is_file(), f"{path} has weights and no settings"


class TrainPredictor(Scenario):
    """`lemo train-predictor` that keeps its state every other step."""

    def work(self, out):
        from lemo_hf.tune.train_predictor import train_predictor

        train_predictor.__kwdefaults__["save_steps"] = 2
        small = ("--rows", 8, "--heldout-rows", 1, "--tokens", 128, "--rank", 4, "--epochs", 1)
        data = ("--model", self.inputs / "model", "--dataset", self.inputs / "book.txt")
        more = ("--block-size", 16, "--layer", 0, "--layer", 2, "--output", out)
        return lemo("train-predictor", *data, *small, *more)

    def result(self, out):
        assert not (out / "training_state").exists(), "the state was not removed"
        predictor = LeMoPredictor.from_pretrained(out)
        return {**predictor.state_dict(), "recall": predictor.info.recall}


class SavePredictor(Scenario):
    """One predictor saved over another."""

    is_command = False

    @cached_property
    def predictors(self):
        """The old one and the new one."""
        return [_predictor(seed) for seed in (1, 2)]

    def prepare(self, out):
        self.predictors[0].save_pretrained(out)

    def work(self, out):
        self.predictors[1].save_pretrained(out)

    def check(self, out):
        found = LeMoPredictor.from_pretrained(out)
        assert any(found.same_as(one) for one in self.predictors), "neither the old nor the new"

    def result(self, out):
        return dict(LeMoPredictor.from_pretrained(out).state_dict())


class LongBench(Scenario):
    """`lemo eval longbench`."""

    def work(self, out):
        data = ("--model", self.inputs / "model", "--data", self.inputs / "data")
        task = ("--task", "passage_count", "--max-length", 64, "--batch-size", 2)
        return lemo("eval", "longbench", *data, *task, "--output", out, "--json")

    def result(self, out):
        return {name: (out / name).read_bytes() for name in ("passage_count.jsonl", "result.json")}


class Perplexity(Scenario):
    """`lemo eval perplexity` over an older result."""

    def prepare(self, out):
        out.mkdir()
        (out / "found.json").write_text('{"perplexity": "old"}')

    def work(self, out):
        data = ("--model", self.inputs / "model", "--dataset", self.inputs / "book.txt")
        files = ("--output", out / "found.json", "--plot", out / "found.png")
        return lemo("eval", "perplexity", *data, "--max-length", 128, *files, "--json")

    def told(self, ended):
        whole = '"perplexity"' in ended.output or "cannot be written" in ended.output
        return None if whole else f"the number is lost: {ended.output}"

    def check(self, out):
        assert "perplexity" in json.loads((out / "found.json").read_text())

    def result(self, out):
        assert (out / "found.png").read_bytes()[:4] == b"\x89PNG"
        return json.loads((out / "found.json").read_text())


SCENARIOS = {
    "train": Train,
    "train-predictor": TrainPredictor,
    "save a predictor": SavePredictor,
    "eval longbench": LongBench,
    "eval perplexity": Perplexity,
}


def same(one: Any, other: Any) -> bool:
    """Whether two results are the same, bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def fresh(folder: Path, scenario: Scenario) -> Path:
    """An output directory as it is before the work."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    scenario.prepare(folder / "out")
    return folder / "out"


def _predictor(seed: int) -> LeMoPredictor:
    torch.manual_seed(seed)
    layers = [BlockPredictor(32, 8, 4), None]
    layers[0].init_weights(torch.Generator().manual_seed(seed))
    return LeMoPredictor(PredictorInfo(8, BaseModel("llama", 32, 2, 4, 2, 97)), layers)
