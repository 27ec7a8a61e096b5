"""LongBench in two processes: they share the rows, and write what one process writes."""

import json

import torch
from support.longbench_rows import as_lines, row
from support.paths import MODEL
from support.processes import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf.eval.longbench import run_longbench

RUN = """
import json
import torch
from support.paths import MODEL
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
from lemo_hf.eval.longbench import run_longbench
state = PartialState(cpu=True)
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
calls = []
model.register_forward_pre_hook(lambda *_: calls.append(1))
def run(length):
    options = {"data": f"{folder}/data", "max_length": length, "batch_size": 2}
    return run_longbench(model, tokenizer, f"{folder}/two", ["passage_count"], **options)
result = run(64)
try:
    run(80)
except ValueError as error:
    refused = str(error)
out = {"result": result, "refused": refused, "worked": bool(calls)}
with open(f"{folder}/rank{state.process_index}.json", "w") as file:
    json.dump(out, file)
"""


def test_two_processes_write_what_one_does(tmp_path):
    text = "It was in the spring of the year that they came to the house by the sea. " * 20
    made = [row(text[9 * i :][: 40 + 60 * i], [str(i)]) for i in range(7)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "passage_count.jsonl").write_bytes(as_lines(made))
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    options = {"data": tmp_path / "data", "max_length": 64, "progress": False}
    result = run_longbench(model, tokenizer, tmp_path / "one", ["passage_count"], **options)
    one, two = (tmp_path / name / "passage_count.jsonl" for name in ("one", "two"))
    # Three rows are there from before, one of them without its batch.
    two.parent.mkdir()
    settings = json.loads((tmp_path / "one" / "settings.json").read_text())
    (two.parent / "settings.json").write_text(json.dumps(settings))
    two.write_bytes(b"".join(one.read_bytes().splitlines(keepends=True)[:3]))
    launch(RUN, tmp_path, processes=[2])
    assert two.read_bytes() == one.read_bytes()
    for rank in range(2):
        out = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert out["result"] == result and out["worked"]
        assert "max_length was 64 and is 80" in out["refused"]
