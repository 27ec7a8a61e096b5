"""The examples run and do what they say."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.hub_server import TOKEN, Hub
from support.paths import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf import LeMoConfig, LeMoPredictor
from lemo_hf.storage.text_rows import load_documents, token_rows

EXAMPLES = ROOT / "examples"
MODEL = EXAMPLES / "demo" / "model"
NOTEBOOK = EXAMPLES / "quick_start.ipynb"
PROCESSES = torch.cuda.device_count() or 2  # that an example launches; a test sees one GPU at most


def load(folder=MODEL):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def loss(model):
    """Of the beginning of the book that the examples train on."""
    text = (EXAMPLES / "demo/text/train-alice-adams.txt").read_text(encoding="utf-8")[:8_000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt")["input_ids"]
    rows = ids[:, :2048].view(4, 512)
    with torch.no_grad():
        return model.eval()(input_ids=rows, labels=rows).loss.item()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example in this process; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options), "--output", "out"])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def start(command, tmp_path, **environment):
    """Runs an example as users do; what it printed."""
    packages = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(
        [*map(str, command), "--output", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(packages), "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def logged(output, name):
    return [float(value) for value in re.findall(rf"'{name}': '?([^',}}]+)", output)]


def test_no_example_hides_a_module_when_it_runs():
    """A script's folder comes first on the path: evaluate.py would be `import evaluate`."""
    names = [path.stem for path in EXAMPLES.iterdir() if path.suffix == ".py" or path.is_dir()]
    modules = [name for name in names if find_spec(name) is not None]
    assert modules == ["accelerate"]  # a folder of YAML; a package of that name goes before it
    assert not list((EXAMPLES / "accelerate").glob("*.py"))


def test_each_example_names_its_command_and_a_real_model():
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh"), NOTEBOOK):
        text = path.read_text(encoding="utf-8")
        assert path is NOTEBOOK or f"examples/{path.name}" in text, path.name
        assert re.search(r"meta-llama/|Qwen/", text), path.name


def test_quick_start(run):
    output = run("quick_start.py", "--steps", 6)
    # Logged every third step; the last of six is the finish.
    assert logged(output, "lemo/attention_retention") == [0.5, 0.6667]
    assert "The last 10% of the steps are dense" in output and "512-token row" in output
    assert all(map(math.isfinite, logged(output, "loss")))
    assert loss(load("out")) < loss(load())
    assert AutoTokenizer.from_pretrained("out").vocab_size == 2048


@pytest.mark.parametrize(
    ("name", "package"), [("train_sft.py", "trl"), ("train_qlora.py", "bitsandbytes")]
)
def test_adapters_by_other_libraries(run, name, package):
    pytest.importorskip(package)
    output = run(name, "--steps", 6)
    found, kept = logged(output, "loss"), logged(output, "lemo/attention_retention")
    assert len(found) == 2 and all(map(math.isfinite, found)), output
    assert all(0.5 <= share < 0.9 for share in kept)
    assert loss(PeftModel.from_pretrained(load(), "out")) < loss(load())


def test_documents_cut_into_rows(run, tmp_path):
    text = (EXAMPLES / "demo/text/train-alice-adams.txt").read_text(encoding="utf-8")
    rows = [json.dumps({"text": text[i : i + 9000]}) for i in range(0, 90000, 9000)]
    (tmp_path / "books.jsonl").write_text("\n".join(rows))
    small = ["--data", tmp_path / "books.jsonl", "--tokens", 512, "--steps", 2]
    output = run("train_lora.py", "--model", MODEL, *small)
    assert "LeMo: 10 of 10 layers" in output
    assert LeMoConfig.from_pretrained("out").retention == 0.5
    adapted = PeftModel.from_pretrained(load(), "out")
    weights = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    assert weights and all(p.abs().max() > 0 for p in weights.values())


def test_preferences(run):
    """Of pairs that it has trained on, the dense model prefers the chosen more than before."""
    pytest.importorskip("trl", minversion="1.16")
    output = run("train_dpo.py", "--steps", 9)
    kept = logged(output, "lemo/attention_retention")
    assert len(kept) == 3 and all(0.4 < share < 0.8 for share in kept)
    pairs = runpy.run_path(str(EXAMPLES / "train_dpo.py"))["book_as_pairs"](
        EXAMPLES / "demo/text/train-alice-adams.txt"
    )
    tokenizer, margins = AutoTokenizer.from_pretrained(MODEL), []
    for model in (load(), PeftModel.from_pretrained(load(), "out")):
        total = 0.0
        for pair in pairs.select(range(12)):
            for name, sign in (("chosen", 1), ("rejected", -1)):
                ids = tokenizer(pair["prompt"] + pair[name], return_tensors="pt")["input_ids"]
                labels = ids.clone()
                labels[:, : len(tokenizer(pair["prompt"])["input_ids"])] = -100
                with torch.no_grad():
                    total -= sign * model.eval()(input_ids=ids, labels=labels).loss.item()
        margins.append(total)
    assert margins[1] > margins[0]


TASKS = {
    "long_document_qa.py": 0.3,
    "agent_trajectories.py": 0.3,
    "summarise.py": 0.5,
    "repository_code.py": 0.53,  # 0.3, and the last of three steps keeps everything
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task(run, name):
    """Each is short enough to be copied, leaves out what it says, and labels its answers."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    if "import SFTConfig" in text:
        pytest.importorskip("trl", minversion="1.16")
    output = run(name, "--steps", 3)
    (found,), (kept,) = logged(output, "loss"), logged(output, "lemo/attention_retention")
    assert math.isfinite(found) and TASKS[name] - 0.05 < kept < TASKS[name] + 0.2, output
    tokens, labels = re.search(r"of a (\d+)-token row \((.*?)\)", output).groups()
    if name == "repository_code.py":
        assert labels == "labels throughout"
    else:
        assert int(tokens) <= 512 and 4 < int(labels.split()[2]) < int(tokens) / 3
    adapter = PeftModel.from_pretrained(load(), "out").state_dict()
    moved = [bool(value.any()) for key, value in adapter.items() if "lora_B" in key]
    assert moved and all(moved)


def test_predictors_are_trained_and_pushed(tmp_path):
    script = [sys.executable, EXAMPLES / "train_predictor_and_push.py", "--push", "me/predictor"]
    with Hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        small = ["--rows", 16, "--epochs", 2, "--tokens", 512]
        output = start([*script, *small], tmp_path, **settings)
        files = hub.files("me/predictor")
    assert {"lemo_config.json", "lemo_predictors.safetensors", "README.md"} <= files.keys()
    for name in ("lemo_config.json", "lemo_predictors.safetensors"):
        assert files[name] == (tmp_path / "out" / name).read_bytes()
    assert b"me/predictor" in files["README.md"]
    found = re.findall(r"layer 4, retention 0.15: recall of (\w+) +([\d.]+)", output)
    recall = {policy: float(share) for policy, share in found}
    assert recall["random"] < recall["predictor"] <= 1
    predictor = LeMoPredictor.from_pretrained(tmp_path / "out")
    assert predictor.known == [4] and predictor.info.recall


def test_thresholds_are_calibrated_and_trained_with(run):
    small = ["--rows", 2, "--calibration-steps", 1, "--tokens", 256, "--block-size", 16]
    output = run("calibrate_thresholds.py", *small, "--steps", 3)
    thresholds = LeMoConfig.from_pretrained("out").threshold
    assert len(thresholds) == 10 and thresholds[:2] == (0, 0) and min(thresholds[2:]) > 0
    assert [f"{t:.3g}" for t in thresholds] == re.search("thresholds: (.*)", output)[1].split()
    rises = re.findall(r"([\d.-]+) nats above dense, mean retention ([\d.]+)", output)
    (one, _), (each, kept) = [tuple(map(float, pair)) for pair in rises]
    assert each <= one and abs(kept - 0.5) < 0.1
    (share,) = logged(output, "lemo/attention_retention")
    assert 0.3 < share < 0.8 and math.isfinite(logged(output, "loss")[0])
    assert loss(load("out")) < loss(load())


def test_evaluation(run):
    run("evaluate_model.py", "--tokens", 256)
    found = json.loads(Path("out/evaluation.json").read_text())
    assert 20 < found["perplexity"]["perplexity"] < 40
    assert len(found["retrieval"]["cells"]) == 3
    assert 0 <= found["longbench"]["multi_news"] < 30
    prediction = json.loads(Path("out/longbench/multi_news.jsonl").read_text())
    assert prediction["pred"] and prediction["answers"]


@pytest.mark.soak
def test_several_processes_train_one_adapter(tmp_path):
    """As many as there are GPUs; two CPU processes without any."""
    output = start([EXAMPLES / "multi_gpu.sh", "--steps", 3, "--tokens", 256], tmp_path)
    assert "LeMo: 10 of 10 layers" in output
    state = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    book = load_documents(EXAMPLES / "demo/text/train-alice-adams.txt")
    rows = len(token_rows(book, AutoTokenizer.from_pretrained(MODEL), 256, progress=False))
    seen = 3 * PROCESSES * state["train_batch_size"]
    assert state["epoch"] == pytest.approx(seen / rows, rel=0.02)
    assert loss(PeftModel.from_pretrained(load(), tmp_path / "out")) < loss(load())


def test_notebook(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    names = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        code = "".join(cell["source"]).replace("TOKENS, STEPS = 512, 16", "TOKENS, STEPS = 256, 6")
        exec(compile(code, f"cell {number}", "exec"), names)
    pyplot.close("all")
    assert [len(line.get_ydata()) for line in names["axis"].lines] == [6, 6]
    losses = names["eval_losses"]
    assert losses["dense"] < losses["before"] and losses["LeMo"] < losses["before"]
    assert 0.4 < sum(map(sum, names["found"].kept["attention"][2:])) / (8 * 8) < 0.6
    assert load("out/notebook/model").config.vocab_size == 2048
