"""`upstream/compare.py` on a suite of five tests: what is told apart, and what is not hidden."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from upstream.in_place import limited
from upstream.tally import compared

COMPARE = Path(__file__).parent / "upstream" / "compare.py"
SUITE = """
import tempfile
import unittest

from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import NameOfAnotherVersion, Trainer, TrainingArguments

ROW = {"input_ids": list(range(32)), "labels": list(range(32))}


def make_trainer(model):
    args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, use_cpu=True, report_to="none")
    return Trainer(model, args, train_dataset=[ROW] * 16)


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2)
    )


class Small(unittest.TestCase):
    def test_supported(self):
        make_trainer(llama()).train()

    def test_other_family(self):
        config = GPTNeoConfig(vocab_size=50, max_position_embeddings=32, hidden_size=16,
                              num_layers=2, num_heads=2, attention_types=[[["global"], 2]])
        make_trainer(GPTNeoForCausalLM(config)).train()

    def test_tags(self):
        self.assertIsNone(make_trainer(llama()).model.model_tags)

    def test_fails(self):
        self.assertEqual(1, 2)

    def test_name(self):
        NameOfAnotherVersion()
"""


@pytest.mark.soak
def test_what_differs_is_told(tmp_path):
    (tmp_path / "tests" / "trainer").mkdir(parents=True)
    (tmp_path / "tests" / "trainer" / "test_small.py").write_text(SUITE)
    (tmp_path / "out" / "stand_ins").mkdir(parents=True)  # none is needed
    command = [sys.executable, COMPARE, "--transformers", tmp_path, "--output", tmp_path / "out"]
    command += ["--modes", "stock", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "tally.json").read_text())["suites"]["transformers"]
    assert found["stock"] == {"passed": 3, "failed": 2}
    sparse = found["modes"]["0.5"]
    assert sparse["same"] == {"passed": 2, "failed": 2}
    (tags,) = sparse["differ"]
    assert tags["test"] == "test_small.py::Small::test_tags"
    assert (tags["stock"], tags["ours"]) == ("passed", "failed") and "lemo-hf" in tags["message"]
    assert sparse["lemo"] == 1 and sparse["trainings"]["compared"] == 1
    (reason,) = sparse["refused"]
    assert "'gpt_neo' is not supported" in reason
    table = (tmp_path / "out" / "tally.md").read_text()
    assert "| transformers | retention 0.5 | 3 | 2 of 3 | 1 | 1 | 0 of 1 | " in table
    assert "| model_type 'gpt_neo' is not supported | 0.5 | 1 |" in table


def test_a_training_less_is_no_equal_one():
    def record(*trainings):
        found = [{"lemo": True, "figures": list(figures)} for figures in trainings]
        return {"a": {"outcome": "passed", "message": "", "trainings": found, "refused": []}}

    stock = record([2.0, 1.0], [3.0, None])
    infinite = float("inf")
    for ours, equal, largest, of_all in (
        (stock, 2, 0.0, 0.0),
        (record([None, 1.0], [3.0, None]), 1, infinite, infinite),
        (record([2.5, 1.0], [3.0, None]), 1, 0.2, 0.2),
        (record([2.0, 9.0], [3.0, None]), 1, 0.0, 8 / 9),
        (record([2.0, 1.0], [3.0]), 1, infinite, infinite),
        (record([2.0, 1.0]), 1, infinite, infinite),
    ):
        trainings = compared(stock, ours, "1")["trainings"]
        assert trainings["compared"] == 2 and trainings["equal"] == equal
        assert trainings["largest"] == pytest.approx(largest)
        assert trainings["largest_of_all"] == pytest.approx(of_all)


def test_a_training_that_left_nothing_out_is_told():
    def record(*shares):
        found = [{"lemo": True, "figures": [1.0], "kept": share} for share in shares]
        return {"a": {"outcome": "passed", "message": "", "trainings": found, "refused": []}}

    ours = record(0.4, 1.0, None)
    assert compared(record(None, None, None), ours, "0.5")["trainings"]["sparse"] == 1


def test_a_missing_test_differs():
    stock = {"a": {"outcome": "passed", "message": "", "trainings": [], "refused": []}}
    (missing,) = compared(stock, {}, "none")["differ"]
    assert missing["ours"] == "missing"


def test_a_test_without_end_is_stopped():
    with pytest.raises(pytest.fail.Exception, match="no end after 1 s"), limited(1):
        time.sleep(30)
