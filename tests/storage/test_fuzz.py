"""What others wrote, changed at random: it is read, or refused in one line; never anything else."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from html.parser import HTMLParser

import pytest
import torch
import yaml
from safetensors.torch import save
from support.fuzz import as_written, broken, changed, fuzz, hostile
from support.hub_client import BASE, make_predictor
from support.longbench_rows import row
from support.paths import MODEL
from transformers import AutoTokenizer

from lemo_hf import LeMoConfig, LeMoPredictor
from lemo_hf.cli.train_settings import dump, read_settings
from lemo_hf.describe import describe_finish
from lemo_hf.eval.longbench_files import append, claim_folder, resume
from lemo_hf.eval.longbench_load import load_task
from lemo_hf.eval.longbench_prompt import prompt_tokens
from lemo_hf.eval.longbench_score import check_rows, score_folder
from lemo_hf.eval.longbench_tasks import TASKS
from lemo_hf.eval.token_files import read_token_file
from lemo_hf.predictors.predictor_files import _sha256
from lemo_hf.report.page import write_report
from lemo_hf.storage.files import CONFIG_NAME, WEIGHTS_NAME
from lemo_hf.storage.text_rows import labelled_rows, load_documents, load_examples

PACKED = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def as_json(value, rng):
    """JSON as Python writes it, or with bytes that are wrong."""
    content = as_written(json.dumps(value)).encode()
    return broken(content, rng) if rng.random() < 0.3 else content


def test_configs(tmp_path):
    full = LeMoConfig(
        retention=(1, 0.5, 0.5, 1), dense_first_layers=1, dense_last_layers=1, recompute="full"
    ).to_dict()

    def attempt(rng, folder):
        values = changed(full if rng.random() < 0.5 else LeMoConfig().to_dict(), rng)
        (folder / CONFIG_NAME).write_bytes(as_json(values, rng))
        config = LeMoConfig.from_pretrained(folder)
        assert LeMoConfig.from_dict(config.to_dict()) == config
        config.layer_rules(4)
        config.recompute_levels(4)
        describe_finish(config)

    fuzz(attempt, tmp_path)


def test_predictor_files(tmp_path):
    recall = {"documents": "books", "layer": 1, "retention": 0.3, "policy": "predictor"}
    training = {"datasets": ["a/b"], "command": "lemo", "rows": 3, "layers": [1, 2]}
    facts = {"recall": [{**recall, "recall": 0.5}], "training": training}
    made = make_predictor(dense=[0], **facts)
    made.save_pretrained(tmp_path / "whole")
    values = json.loads((tmp_path / "whole" / CONFIG_NAME).read_text())
    weights = (tmp_path / "whole" / WEIGHTS_NAME).read_bytes()

    def attempt(rng, folder):
        kind = rng.randrange(3)
        new, tensors = values, weights
        if kind == 0:
            section = changed(values["predictor"], rng)
            new = {**values, "predictor": section} if rng.random() < 0.9 else changed(values, rng)
        elif kind == 1:
            tensors = broken(weights, rng)
        else:
            named = {f"networks.1.{'x' * rng.randrange(3)}": torch.zeros(rng.randrange(4), 2)}
            tensors = save({**made.state_dict(), **named})
        (folder / WEIGHTS_NAME).write_bytes(tensors)
        if kind and rng.random() < 0.8:  # so that more than the checksum is looked at
            section = {**values["predictor"], "sha256": _sha256(folder / WEIGHTS_NAME)}
            new = {**values, "predictor": section}
        (folder / CONFIG_NAME).write_bytes(as_json(new, rng))
        loaded = LeMoPredictor.from_pretrained(folder)
        loaded.describe()
        loaded.info.base.check(BASE)
        loaded.save_pretrained(folder / "again")
        LeMoConfig.from_pretrained(folder / "again")

    fuzz(attempt, tmp_path)


SETTINGS = """
model: {name: a, dtype: float32, rope_parameters: {rope_type: linear, factor: 2.0}}
data: {dataset: [a.jsonl, b.jsonl], tokens: 256, max_rows: 4}
lora: {r: 4, lora_alpha: 8, target_modules: [a, b], lora_dropout: 0.1, layers_to_transform: [1]}
lemo: {retention: 0.5, block_size: 32, dense_first_layers: 1, recompute: [full, none]}
training: {output_dir: out, max_steps: 3, learning_rate: 1e-3, save_strategy: "no", use_cpu: true,
  lr_scheduler_kwargs: {a: 1}, report_to: none, optim: adamw_torch, seed: 3, warmup_steps: 1}
"""


def test_yaml(tmp_path):
    start = yaml.safe_load(SETTINGS)

    def attempt(rng, folder):
        if rng.random() < 0.6:
            text = _as_yaml(changed(start, rng))
        else:
            text = broken(SETTINGS.encode(), rng)
        (folder / "run.yaml").write_bytes(text)
        flags = []
        if rng.random() < 0.3:
            flags = [f"--lemo.{rng.choice(('retention', 'seed', 'x'))}", str(hostile(rng))[:10_000]]
        settings = read_settings(str(folder / "run.yaml"), flags)
        again = folder / "again.yaml"
        again.write_text(dump(settings.build(), settings))
        read_settings(str(again)).model()

    fuzz(attempt, tmp_path)


def _as_yaml(value):
    """JSON is YAML, too."""
    return as_written(json.dumps(value, ensure_ascii=False)).encode("utf-8", "surrogatepass")


TOKENIZER = []  # made once, in the process that reads with it


def test_longbench_rows(tmp_path):
    tasks = ["lcc", "trec", "passage_retrieval_en", "qasper", "gov_report"]
    start = [
        row("text of a row", ["Paragraph 2", "b"], ["Paragraph 2", "b", "c"]),
        row("another row", ["Paragraph 1"], ["Paragraph 2", "Paragraph 1"]),
    ]

    def attempt(rng, folder):
        TOKENIZER[:] = TOKENIZER or [AutoTokenizer.from_pretrained(MODEL)]
        task, extended = rng.choice(tasks), rng.random() < 0.5
        name = f"{task}_e.jsonl" if extended else f"{task}.jsonl"
        rows = changed(start, rng) if rng.random() < 0.8 else start
        rows = rows if isinstance(rows, list) else [rows]
        content = b"\n".join(as_json(one, rng) for one in rows)
        kind = rng.choice(("", ".gz", ".xz", ".zip"))
        if kind == ".zip":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", rng.choice((0, 8, 12, 14))) as archive:
                archive.writestr(f"data/{name}", content)
            packed, path = buffer.getvalue(), folder / "data.zip"
        else:
            packed, path = PACKED[kind](content), folder / f"{name}{kind}"
        path.write_bytes(broken(packed, rng) if kind and rng.random() < 0.5 else packed)
        data = folder if kind != ".zip" else path
        found = load_task(task, data, extended=extended)
        check_rows(task, found)
        for one in found:
            prompt_tokens(TASKS[task], one, TOKENIZER[0], 64)
        out = folder / "out"
        claim_folder(out, {"a": 1})
        assert resume(out / f"{task}.jsonl", found, 1) == 0
        append(out / f"{task}.jsonl", found, ["a Paragraph 1"] * len(found))
        score_folder(out, extended=extended)

    fuzz(attempt, tmp_path)


def test_longbench_predictions(tmp_path):
    rows = [row(f"{i}", ["Paragraph 1"], ["a", "b"]) for i in range(3)]
    lines = [{"pred": "a b. c", **one} for one in rows]
    settings = {"settings": {"model": "a", "b": 1}, "rows": {"gov_report": 3, "lcc": 3}}

    def attempt(rng, folder):
        task = rng.choice(("gov_report", "lcc", "passage_retrieval_en", "trec"))
        new = changed(lines, rng)
        new = new if isinstance(new, list) else [new]
        path = folder / f"{task}.jsonl"
        path.write_bytes(b"".join(as_json(line, rng) + b"\n" for line in new))
        if rng.random() < 0.6:
            (folder / "settings.json").write_bytes(as_json(changed(settings, rng), rng))
        if rng.random() < 0.5:
            claim_folder(folder, settings["settings"])
            resume(path, rows, rng.choice((1, 2)))
        score_folder(folder, extended=rng.random() < 0.5 and task != "x")

    fuzz(attempt, tmp_path)


def test_documents(tmp_path):
    start = [
        {"text": "a document", "prompt": "a", "completion": "b"},
        {"text": "two", "prompt": "c", "completion": "d"},
        {"text": "three", "prompt": "e", "completion": "f"},
    ]
    labelled = [{"input_ids": [1, 2], "labels": [-100, 2]}] * 3

    class Bytes:
        bos_token_id = eos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": list(text.encode())}

    def attempt(rng, folder):
        rows = changed(rng.choice((start, labelled)), rng) if rng.random() < 0.7 else start
        rows = rows if isinstance(rows, list) else [rows]
        kind, end = rng.choice((".jsonl", ".jsonl", ".txt", ".json")), rng.choice(list(PACKED))
        content = b"\n".join(as_json(one, rng) for one in rows)
        if kind == ".json":  # which datasets reads: pyarrow itself cannot take what is very deep
            content, end = json.dumps(start).encode(), ""
            content = broken(content, rng).replace(b"[[[", b"").replace(b"{{{", b"")
        packed = PACKED[end](content)
        path = folder / f"a{kind}{end}"
        path.write_bytes(broken(packed, rng) if end and rng.random() < 0.5 else packed)
        if rng.random() < 0.6:
            assert all(isinstance(text, str) for text in load_documents(path))
        else:
            labelled_rows(load_examples(path), Bytes(), 100)

    fuzz(attempt, tmp_path)


def test_token_files(tmp_path):
    def attempt(rng, folder):
        (folder / "a.bin").write_bytes(broken(bytes(64), rng))
        read_token_file(folder / "a.bin", 97)

    fuzz(attempt, tmp_path)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)


def run_files():
    """Of a small run with everything that its page shows, by path."""
    rows = [
        {"step": i, "seconds": 1.5, "tokens": 100 * i, "host_memory_gib": 0.5, "gpu_peak_gib": 1.0}
        | {"attention": [1.0, 0.5], "mlp": [1.0, 0.25]}
        for i in (1, 2, 3)
    ]
    curves = [[1.0, 0.5, 1], [0.25, 0.25, 0.5]]
    log = [
        {"step": i, "loss": 3.0 / i, "lemo/attention_retention": 0.5, "epoch": 1} for i in (1, 2)
    ]
    log += [{"step": 2, "eval_loss": 2.5}, {"step": 2, "train_loss": 2.0}]
    recall = {"documents": "books", "layer": 1, "retention": 0.3, "policy": "predictor"}
    return {
        "lemo_report.json": {
            "model": {"name": "a", "trained": 5, "parameters": 10},
            "lemo": LeMoConfig().to_dict(),
            "sparse": "Half of it.",
            "training": {"learning_rate": 1e-3, "x": [1, 2]},
            "environment": {"versions": {"torch": "2"}, "gpus": {"names": ["a", "b"]}},
            "rows": rows,
            "place_layers": [1, 2],
            "moments": [
                {"first": i, "last": i + 1, "rows": 2, "attention": curves, "mlp": curves[::-1]}
                for i in (1, 3)
            ],
        },
        "trainer_state.json": {"log_history": log, "global_step": 2},
        "lemo_config.json": {
            **LeMoConfig(policy="predictor").to_dict(),
            "predictor": {"recall": [{**recall, "recall": 0.5}]},
        },
        "adapter_config.json": {"r": 8, "target_modules": ["a"], "x": {"y": 1}},
        "ppl.json": {
            "perplexity": 3.0,
            "by_position": [{"first": 1, "last": 2, "perplexity": 3.0}],
            "dataset": ["a"],
        },
        "needles.json": {
            "accuracy": 0.5,
            "cells": [{"length": 8, "depth": 0.5, "accuracy": 1, "samples": 2}],
        },
        "bench/result.json": {"lcc": {"0-4k": 1.5, "8k+": 2}, "trec": {"0-4k": 3.0}},
        "bench/other.json": {"lcc": 5.0, "trec": 3},
    }


@pytest.mark.parametrize("several", [False, True])
def test_report_data(several, tmp_path):
    whole = run_files()

    def attempt(rng, folder):
        (folder / "bench").mkdir()
        wrong = set(rng.sample(sorted(whole), 3 if several else 1))
        for name, values in whole.items():
            values = changed(values, rng) if name in wrong else values
            content = as_json(values, rng) if name in wrong else json.dumps(values).encode()
            (folder / name).write_bytes(content)
        (folder / "lemo_train.yaml").write_bytes(broken(b"a: 1\n<script>", rng))
        page = write_report(folder).read_text(encoding="utf-8")
        assert not Tags(page).seen & {"script", "img", "link", "iframe"}

    fuzz(attempt, tmp_path)
