"""LongBench end to end: runs that go on where they stopped, and refuse what does not belong."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.longbench_rows import ROWS, TEMPLATE, as_lines, row
from support.paths import MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf.eval import longbench
from lemo_hf.eval.generation import continue_greedily
from lemo_hf.eval.longbench import run_longbench
from lemo_hf.eval.longbench_load import load_task
from lemo_hf.eval.longbench_prompt import prompt_tokens
from lemo_hf.eval.longbench_score import score_folder
from lemo_hf.eval.longbench_tasks import TASKS


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def predictions(folder, task):
    lines = (Path(folder) / f"{task}.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


def test_real_rows_end_to_end(model, tokenizer, tmp_path):
    tasks = ["multi_news", "passage_retrieval_zh"]
    options = {"data": ROWS, "max_length": 96, "max_rows": 2, "progress": False}
    result = run_longbench(model, tokenizer, tmp_path / "1", tasks, batch_size=2, **options)
    assert json.loads((tmp_path / "1" / "result.json").read_text()) == result
    assert list(result) == tasks and 0 < result["multi_news"] < 30
    for task in tasks:
        data, made = load_task(task, ROWS)[:2], predictions(tmp_path / "1", task)
        assert [list(line) for line in made] == [["pred", "answers", "all_classes", "length"]] * 2
        assert [line["answers"] for line in made] == [line["answers"] for line in data]
        assert [line["length"] for line in made] == [line["length"] for line in data]
        ids = [prompt_tokens(TASKS[task], line, tokenizer, 96) for line in data]
        texts = continue_greedily(model, tokenizer, ids[:1], 16)
        assert made[0]["pred"].startswith(texts[0].rstrip("\ufffd"))
    alone = run_longbench(model, tokenizer, tmp_path / "2", tasks[1:], **options)
    assert alone == {tasks[1]: result[tasks[1]]}
    assert predictions(tmp_path / "2", tasks[1]) == predictions(tmp_path / "1", tasks[1])


def samples(folder, tasks=("passage_count",), rows=7):
    """Rows from real text, of different lengths."""
    folder.mkdir()
    text = load_task("multi_news", ROWS)[0]["context"]
    made = [row(text[i * 150 :][: 40 + 60 * i], [str(i)], None, text[:20]) for i in range(rows)]
    for task in tasks:
        (folder / f"{task}.jsonl").write_bytes(as_lines(made))
        (folder / f"{task}_e.jsonl").write_bytes(as_lines(made))
    return folder


def run(model, tokenizer, folder, data, tasks=("passage_count",), **options):
    options = {"max_length": 64, "progress": False, **options}
    return run_longbench(model, tokenizer, folder, tasks, data=data, **options)


class Stopped(BaseException):
    """The process was told to end."""


@pytest.mark.parametrize(("batch_size", "written"), [(1, 4), (2, 4), (3, 3)])
def test_an_interrupted_run_goes_on(batch_size, written, model, tokenizer, tmp_path, monkeypatch):
    data = samples(tmp_path / "data")
    options = {"data": data, "batch_size": batch_size}
    result = run(model, tokenizer, tmp_path / "whole", **options)
    batches = []

    def counted(*args, **kwargs):
        if len(batches) == stop_after:
            raise Stopped
        batches.append(args)
        return continue_greedily(*args, **kwargs)

    monkeypatch.setattr(longbench, "continue_greedily", counted)
    stop_after = written // batch_size
    model.train()
    with pytest.raises(Stopped):
        run(model, tokenizer, tmp_path / "cut", **options)
    assert model.training
    model.eval()
    path = tmp_path / "cut" / "passage_count.jsonl"
    whole = (tmp_path / "whole" / "passage_count.jsonl").read_bytes()
    assert whole.startswith(path.read_bytes())
    assert path.read_bytes().count(b"\n") == written
    assert not (tmp_path / "cut" / "result.json").exists()
    # The last line torn in a letter's middle, and with more than one row, a batch torn in two.
    path.write_bytes(path.read_bytes()[:-3])
    stop_after = None
    batches.clear()
    assert run(model, tokenizer, tmp_path / "cut", **options) == result
    assert path.read_bytes() == whole
    left = 7 - (written - 1) // batch_size * batch_size
    assert len(batches) == -(-left // batch_size)
    batches.clear()
    assert run(model, tokenizer, tmp_path / "cut", **options) == result
    assert not batches and path.read_bytes() == whole


def test_results_of_other_settings_are_refused(model, tokenizer, tmp_path):
    data = samples(tmp_path / "data", ["passage_count", "lcc"], rows=2)
    folder = tmp_path / "run"
    run(model, tokenizer, folder, data)
    before = (folder / "passage_count.jsonl").read_bytes()
    with pytest.raises(ValueError, match="max_length was 64 and is 80.*Give another folder"):
        run(model, tokenizer, folder, data, max_length=80)
    with pytest.raises(ValueError, match="max_rows was None and is 1"):
        run(model, tokenizer, folder, data, max_rows=1)
    with pytest.raises(ValueError, match="extended was False and is True"):
        run(model, tokenizer, folder, data, extended=True)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="chat_template was None and is '"):
        run(model, tokenizer, folder, data)
    tokenizer.chat_template = None
    weight = model.model.layers[0].mlp.up_proj.weight.data
    kept = weight[0, 0].clone()
    weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights was"):
        run(model, tokenizer, folder, data)
    weight[0, 0] = kept
    assert (folder / "passage_count.jsonl").read_bytes() == before
    # Another task, and other batches, are of the same settings.
    assert list(run(model, tokenizer, folder, data, ["lcc"], batch_size=2)) == [
        "passage_count",
        "lcc",
    ]


def test_predictions_of_unknown_settings_are_refused(model, tokenizer, tmp_path):
    data = samples(tmp_path / "data", rows=2)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "lcc.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"predictions but no settings.json"):
        run(model, tokenizer, tmp_path / "theirs", data)
    assert sorted(os.listdir(tmp_path / "theirs")) == ["_lock", "lcc.jsonl"]


def test_predictions_of_other_rows_are_refused(model, tokenizer, tmp_path):
    data = samples(tmp_path / "data", rows=2)
    run(model, tokenizer, tmp_path / "run", data)
    path = tmp_path / "run" / "passage_count.jsonl"
    for lines, message in (
        (b'{"pred": "a", "answers": ["5"]}\n', "line 1 has other answers than the data. Remove"),
        (b'{"pred": "a", "answ\n', "line 1 is no prediction"),
        (b'{"pred": "' + b"\xe1" * 9000 + b'"}\n', "^.{60,700}$"),  # not the line, whole
        (path.read_bytes() * 2, "there are 4 predictions of 2 rows"),
    ):
        path.write_bytes(lines)
        with pytest.raises(ValueError, match=message):
            run(model, tokenizer, tmp_path / "run", data)
        assert path.read_bytes() == lines


def test_two_runs_do_not_share_a_folder(model, tokenizer, tmp_path, monkeypatch):
    data = samples(tmp_path / "data", ["passage_count", "lcc"], rows=4)
    expected = run(model, tokenizer, tmp_path / "alone", data)
    refused = []

    def another_begins(*args, **kwargs):
        with pytest.raises(ValueError, match="another run is writing to .*run: wait for its end"):
            run(model, tokenizer, tmp_path / "run", data)
        refused.append(args)
        return continue_greedily(*args, **kwargs)

    monkeypatch.setattr(longbench, "continue_greedily", another_begins)
    assert run(model, tokenizer, tmp_path / "run", data) == expected and len(refused) == 4
    monkeypatch.undo()
    path = tmp_path / "run" / "passage_count.jsonl"
    assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()
    assert run(model, tokenizer, tmp_path / "run", data) == expected  # it is free again
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="has 8 predictions of 4 rows: several runs wrote to it"):
        score_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="has 8 predictions of 4 rows: several runs wrote to it"):
        run(model, tokenizer, tmp_path / "run", data, ["lcc"])


def test_adapters_that_differ_in_scaling_alone_are_told_apart(tokenizer, tmp_path):
    data = samples(tmp_path / "data", rows=1)
    tuned = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tuned = get_peft_model(tuned, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    run(tuned, tokenizer, tmp_path / "run", data)
    for module in tuned.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 4.0
    with pytest.raises(ValueError, match="scaling was"):
        run(tuned, tokenizer, tmp_path / "run", data)


def test_samsum_ends_with_its_line(model, tokenizer, tmp_path):
    data = samples(tmp_path / "data", ["samsum", "triviaqa"], rows=4)
    run(model, tokenizer, tmp_path / "run", data, ["samsum", "triviaqa"])
    summaries = [line["pred"] for line in predictions(tmp_path / "run", "samsum")]
    assert all(text and "\n" not in text[:-1] for text in summaries)
    assert any(text.endswith("\n") and text.strip() for text in summaries)
    assert any("\n" in line["pred"][:-1] for line in predictions(tmp_path / "run", "triviaqa"))


def test_extended_runs_score_by_length(model, tokenizer, tmp_path):
    data = samples(tmp_path / "data", rows=3)
    result = run(model, tokenizer, tmp_path / "run", data, extended=True)
    assert list(result["passage_count"]) == ["0-4k", "4-8k", "8k+"]
    assert 0 <= result["passage_count"]["0-4k"] <= 100
    assert os.path.isfile(tmp_path / "run" / "passage_count.jsonl")


def test_the_default_length_is_what_the_context_has_room_for(model, tokenizer, tmp_path, caplog):
    data = samples(tmp_path / "data", rows=1)
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    text = row("word " * 3000, ["1"])
    (data / "passage_count.jsonl").write_bytes(as_lines([text]))
    with caplog.at_level(logging.WARNING, "lemo_hf"):
        run(model, tokenizer, tmp_path / "1", data, max_length=None)
    assert 460 < seen[0] <= 512 - 32 and not caplog.text
    seen.clear()
    with caplog.at_level(logging.WARNING, "lemo_hf"):
        run(model, tokenizer, tmp_path / "2", data, max_length=490)
    handle.remove()
    assert seen[0] >= 489
    assert (
        "prompts of 490 tokens and 32 generated ones may exceed the model's context" in caplog.text
    )
    with pytest.raises(ValueError, match="512 tokens has no room.*gov_report generates 512"):
        run(model, tokenizer, tmp_path / "3", data, ["gov_report"], max_length=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"tasks": ["squad"]}, "no task 'squad'"),
    ],
)
def test_settings_that_cannot_be(options, message, model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, tmp_path / "run", tmp_path, **options)
    assert not (tmp_path / "run").exists()


def test_chinese_runs_need_jieba_from_the_start(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match=r"lemo-hf\[zh\]"):
        run(model, tokenizer, tmp_path / "run", ROWS, ["multi_news", "dureader"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("answers", "message"),
    [([5], "'answers' must hold texts, got 5"), (["b"], "'b' names no Paragraph")],
)
def test_what_cannot_be_scored_is_told_before_anything_is_generated(
    answers, message, model, tokenizer, tmp_path
):
    """Also where the task before it is whole."""
    tasks = ("passage_count", "passage_retrieval_en")
    data = samples(tmp_path / "data", tasks[:1])
    rows = [row("a", ["Paragraph 1"]), row("b", answers)]
    (data / f"{tasks[1]}.jsonl").write_bytes(as_lines(rows))
    with pytest.raises(ValueError, match=f"passage_retrieval_en.*row 2: .*{message}"):
        run(model, tokenizer, tmp_path / "out", data, tasks)
    assert not (tmp_path / "out").exists()
