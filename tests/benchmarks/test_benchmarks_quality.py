"""The quality benchmark: its rows, its schedule, its evaluation, its queue, tables and pictures."""

import json
import lzma
import os
import re
import time
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import make_model, save_tiny
from support.paths import DEMO
from transformers import AutoTokenizer

from benchmarks.quality import completion_rows, evaluate, plots, prepare, results, run, tables
from benchmarks.quality import train as training
from benchmarks.quality.cases import GROUPS, jobs_of
from benchmarks.quality.evaluate import Judge, ask, token_nats
from benchmarks.quality.experiment import Experiments
from benchmarks.quality.facts import HIDDEN_KINDS, MAKERS, Draw
from benchmarks.quality.feed import Feed
from benchmarks.quality.job import Job
from benchmarks.quality.model import load_model, reset_adapter, s2_attention
from benchmarks.quality.row import TASKS, RowSet, make_row, weave
from benchmarks.quality.schedule import Schedule
from benchmarks.quality.train import train
from benchmarks.quality.words import CATEGORIES, SYNONYMS, of_split
from benchmarks.quality.workers import Queue, Setup, Worker
from lemo_hf import LeMoConfig
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX

MODEL, TEXT = DEMO / "model", DEMO / "text"
CPU = torch.device("cpu")
TOKENS = 1024
FUNCTION_WORDS = {
    "the",
    "of",
    "is",
    "one",
    "which",
    "what",
    "has",
    "digits",
    "belong",
    "to",
    "kind",
} | {
    "home",
    "master",
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    book = (TEXT / "train-alice-adams.txt").read_text()
    news = folder / "news.jsonl.xz"
    with lzma.open(news, "wt") as file:
        for i in range(10):
            part = book[9000 * i : 9000 * i + 500 * (i + 1)]
            row = {"context": part + " NEWLINE_CHAR End.", "answers": [f"Summary {i}. " * 40]}
            file.write(json.dumps(row) + "\n")
    prepare.main(
        [
            *(str(folder), "--model", str(MODEL), "--news", str(news)),
            *("--train", str(TEXT / "train-alice-adams.txt")),
            *("--test", str(TEXT / "heldout-oh-money-money.txt")),
        ]
    )
    return folder


@pytest.fixture(scope="session")
def feed(texts) -> Feed:
    return Feed(MODEL, texts, processes=0)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny model whose heads the key heads do not halve, as SmolLM2's, with the demo's words."""
    folder = tmp_path_factory.mktemp("base")
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
    save_tiny(folder, hidden_size=24, num_hidden_layers=2, **heads)
    return folder


def rows(feed: Feed, task: str, count: int = 3, tokens: int = TOKENS, **changes) -> list:
    return list(islice(feed.rows(RowSet(task, tokens, **changes)), count))


def job(**changes) -> Job:
    return Job(**{"arm": "dense", "task": "lexical", "tokens": TOKENS, "steps": 2, **changes})


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_made_from_seed_and_index(feed, task):
    first, again = rows(feed, task), rows(feed, task)
    other = rows(feed, task, seed=1)
    for row, same, unlike in zip(first, again, other, strict=True):
        assert len(row.ids) == TOKENS and row.ids.dtype == np.uint16
        assert np.array_equal(row.ids, same.ids) and np.array_equal(row.gold, same.gold)
        assert not np.array_equal(row.ids, unlike.ids)
        assert len(row.answers) == len(row.kinds) > 0 and len(row.gold) > 0
        assert (row.gold[:, 1] <= row.asked_from).all()
        expected = np.full(TOKENS, task == "text")
        for a, b in row.answers:
            expected[a:b] = True
        assert np.array_equal(row.labelled, expected)
        assert np.array_equal(row.labels != IGNORE_INDEX, expected)
        blocks = row.gold_blocks(64)
        assert all(blocks[a // 64] and blocks[(b - 1) // 64] for a, b in row.gold)


def test_answers_stand_in_the_gold(feed):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for row in rows(feed, "lexical"):
        gold = [row.ids[a:b].tolist() for a, b in row.gold]
        told = [tokenizer.decode(ids) for ids in gold]
        assert set(row.kinds) == {"value", "quotation"}
        for (a, b), kind in zip(row.answers, row.kinds, strict=True):
            if kind == "quotation":
                assert row.ids[a - completion_rows.CUE : b].tolist() in gold
            else:
                answer = tokenizer.decode(row.ids[a:b]).strip()
                assert sum(answer in text for text in told) == 1
    for row in rows(feed, "text"):
        whole = [row.ids[a:b].tolist() for a, b in row.gold]
        for (a, b), kind in zip(row.answers, row.kinds, strict=True):
            passage = row.ids[a:b].tolist()
            if kind == "quotation":
                assert any(passage == ids[-len(passage) :] for ids in whole)
            before = row.gold[:, 1].min()
            assert before <= a  # what is recalled was told before
    for row in rows(feed, "summary", tokens=1024):
        assert "Summary" in tokenizer.decode(row.ids[row.asked_from :])


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower())) - FUNCTION_WORDS


def test_hidden_questions_share_no_words_with_the_place_of_their_answer():
    for split in ("train", "test"):
        draw = Draw(np.random.default_rng(3), split)
        for kind in HIDDEN_KINDS:
            for _ in range(3):
                question = MAKERS[kind](draw)
                place = question.facts[-1]
                assert not words(question.ask) & words(place)
                assert (question.answer.strip() in place) == (kind != "category")
                if kind in ("synonym", "category"):
                    assert not words(question.ask + question.answer) & words(place) or (
                        question.answer.strip().isdigit()
                    )
                for near, far in zip(question.facts, question.facts[1:], strict=False):
                    assert words(near) & words(far)  # chains are linked
    parts = [set(of_split(SYNONYMS, split)) for split in ("train", "test")]
    assert len(SYNONYMS) >= 60 and not parts[0] & parts[1]
    singles = [word for pair in SYNONYMS for word in pair]
    assert len(singles) == len(set(singles))
    assert all(len(of_split(members, "test")) > 2 for members in CATEGORIES.values())


def test_pieces_are_woven_in():
    text = np.arange(10, dtype=np.uint16)
    ids, spans, moved = weave(text, [2, 2, 7], [[90, 91], [92], [93]])
    assert ids.tolist() == [0, 1, 90, 91, 92, 2, 3, 4, 5, 6, 93, 7, 8, 9]
    assert spans == [(2, 4), (4, 5), (10, 11)]
    assert [ids[moved(token)] for token in range(10)] == list(range(10))


def test_cut_rows_keep_their_questions(feed):
    for task in ("lexical", "hidden"):
        for row in rows(feed, task):
            (end,) = row.cut(2)
            assert np.array_equal(end.ids, row.ids[TOKENS // 2 :])
            assert end.kinds == row.kinds and end.labelled.sum() == row.labelled.sum()
            assert end.lost + len(end.gold) == len(row.gold) and end.lost > 0
            assert np.array_equal(end.asking, row.asking[TOKENS // 2 :])
    for row in rows(feed, "text"):
        parts = row.cut(4)
        assert np.array_equal(np.concatenate([part.ids for part in parts]), row.ids)
        assert sum(len(part.answers) for part in parts) <= len(row.answers)


def test_a_schedule_warms_up_decays_and_finishes_dense():
    timed = Schedule(job(steps=None, seconds=100.0, finish=0.3, cut=2, batch=4))
    assert timed.share(5, 50.0) == 0.5
    assert not timed.finishes(0.69) and timed.finishes(0.7)
    assert timed.rows(0.5) == (2, 4) and timed.rows(0.8) == (1, 1)
    assert timed.retention(0.5) is None and timed.retention(0.8) == 1.0
    rates = [timed.rate(step, share) for step, share in ((0, 0.0), (50, 0.0), (90, 0.5), (99, 1))]
    assert rates == pytest.approx([2e-4, 1e-3, 5e-4, 0])
    assert timed.over(9, 98.0, 5.0) and not timed.over(9, 97.0, 5.0)
    kept = {"policy": "recent", "retention": 0.3, "fp8": True}
    ends = Schedule(job(steps=None, seconds=100.0, finish=0.1, bf16=0.3, lemo=kept))
    assert [ends.in_fp8(share) for share in (0.69, 0.7, 0.89, 0.9)] == [True] + 3 * [False]
    assert [ends.retention(share) for share in (0.69, 0.7, 0.89, 0.9)] == [None] * 3 + [1.0]
    assert timed.in_fp8(0.69) and not timed.in_fp8(0.7)
    stepped = Schedule(job(steps=10, ramp=(0.2, 1.0)))
    assert stepped.share(5, 0.0) == 0.5 and stepped.over(10, 0.0, 0.0)
    ramp = [stepped.retention(share / 20) for share in range(21)]
    assert ramp[0] == 0.2 and ramp[-1] == 1.0 and ramp == sorted(ramp)


def test_exact_answers_are_those_of_greedy_decoding():
    model = make_model("llama", "sdpa").eval()
    ids = torch.randint(3, 97, (1, 40))
    with torch.no_grad():
        for place in range(30, 34):  # the model's own continuation
            ids[0, place] = model(ids[:, :place]).logits[0, -1].argmax()
        asked = make_row(ids[0].numpy(), [(30, 34), (10, 14)], ["right", "other"], [], 0)
        found = ask(model, [asked, asked], CPU)
        logits = model(ids).logits.log_softmax(-1)[0]
        nats = token_nats(model, ids)[0]
    expected = -logits[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(nats, expected, atol=1e-5)
    assert found["right"]["exact"] == 1.0 and found["other"]["exact"] == 0.0
    assert found["right"]["count"] == 2
    assert found["other"]["nats"] == pytest.approx(float(expected[9:13].mean()), abs=1e-3)


def test_key_tokens_are_those_that_far_context_helps(feed, base, monkeypatch):
    model = load_model(base, TOKENS, CPU).eval()
    judge = Judge(feed, TOKENS, rows=1, windows=1, device=CPU)
    monkeypatch.setattr(evaluate, "GAIN", 0.0)
    monkeypatch.setattr(evaluate, "LIKELY", -100.0)
    key = judge.key_tokens(model)
    size, window = TOKENS // 8, judge.text[0]
    with torch.no_grad():
        far = token_nats(model, window[None])[0]
        near = token_nats(model, window[None, size // 2 : size // 2 + size])[0, -size // 2 :]
    expected = near > far[size - 1 : size - 1 + size // 2]
    assert torch.equal(key[0, size - 1 : size - 1 + size // 2], expected)
    plain = judge.plain_text(model)
    assert len(plain["by_position"]) == 4 and plain["key_tokens"] == int(key.sum()) > 0


def test_the_base_is_extended_by_yarn(base):
    model = load_model(base, TOKENS, CPU)
    parameters = model.config.rope_parameters
    assert parameters["rope_type"] == "yarn" and parameters["factor"] == 2
    assert load_model(base, 512, CPU).config.rope_parameters["rope_type"] == "default"
    ids = torch.arange(64)[None]
    dense = model(ids).logits
    with s2_attention(model):
        assert not torch.allclose(model(ids).logits, dense, atol=1e-6)
    assert torch.equal(model(ids).logits, dense)


OVERLAP = {"policy": "overlap", "retention": 0.5}


@pytest.mark.parametrize(
    "changes",
    [
        {"lemo": OVERLAP},
        {"lemo": OVERLAP, "asks": "gold"},
        {"lemo": OVERLAP, "asks": "question"},
        {"task": "text", "lemo": {"policy": "random", "retention": 0.25}, "finish": 0.5},
        {"cut": 2, "batch": 2, "finish": 0.5},
        {"task": "hidden", "attention": "s2", "finish": 0.5},
        {"steps": None, "seconds": 0.3},
    ],
)
def test_training(feed, base, changes, monkeypatch):
    monkeypatch.setattr(training, "WARM_STEPS", 1)
    model = load_model(base, TOKENS, CPU)
    this = job(**changes)
    reset_adapter(model, this.seed)
    before = {name: p.clone() for name, p in model.named_parameters()}
    took = train(this, model, feed, CPU)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed and all("lora" in name for name in changed)
    assert this.seconds is not None or took["steps"] == this.steps
    assert took["finish_steps"] == (1 if this.finish else 0)
    assert took["rows_seen"] > 0 and took["labels"] > 0
    if this.asks == "gold":
        assert took["recall"] == 1.0
    if this.cut > 1:
        assert took["recall"] < 1.0
    if this.lemo.get("retention") == 0.25:
        assert took["kept"] == pytest.approx((0.25 + 1) / 2, abs=0.02)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.base_model, "_lemo")
    if this.asks == "gold":  # whatever was trained before
        assert train(this, model, feed, CPU)["losses"] == took["losses"]


def serve(connection) -> None:
    """A worker whose jobs wait, or kill it."""
    connection.send("ready")
    while (this := connection.recv()) is not None:
        if this.arm == "dies":
            os._exit(3)
        time.sleep(30 if this.arm == "hangs" else 0.1)
        row = {**this.to_dict(), "status": "ok"}
        if this.arm == "breaks its GPU":
            row = {**row, "status": "failed: CUDA error", "fatal": True}
        connection.send(row)
        if "fatal" in row:
            return


def start(gpu: int) -> Worker:
    context = get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return Worker(gpu, process, here)


def run_queue(arms: list[str], seconds: float = 20.0, gpus: int = 2) -> list[dict]:
    queue = Queue(start, gpus, time.monotonic() + seconds, overhead=0.1)
    found = list(queue.run([job(arm=arm, seed=seed) for seed, arm in enumerate(arms)]))
    assert not any(worker.process.is_alive() for worker in queue.workers)
    return sorted(found, key=lambda row: row["seed"])


def test_a_process_that_dies_is_a_row_and_the_rest_goes_on():
    found = run_queue(["dies", "dies", *["dense"] * 4, "breaks its GPU", "dense"])
    status = [row["status"] for row in found]
    assert status[:2] == ["failed: its process ended with 3"] * 2
    assert status[2:] == ["ok"] * 4 + ["failed: CUDA error", "ok"]


def test_nothing_starts_or_stays_beyond_the_end():
    begin = time.monotonic()
    found = run_queue(["hangs", *["dense"] * 90], seconds=2.0)
    assert time.monotonic() - begin < 9
    assert found[0]["status"] == "out of time"
    assert 1 < len(found) < 60 and all(row["status"] == "ok" for row in found[1:])


def test_cases_are_settings_that_lemo_takes():
    for group in GROUPS:
        jobs = jobs_of([group], predictor=None)
        assert len({case.name for case in jobs}) == len(jobs)
        for case in jobs:
            LeMoConfig(**case.lemo)
    headline = jobs_of(["headline"])
    assert {case.seed for case in headline} == {0, 1, 2}
    assert sum(case.expected + 15 for case in headline) < 100 * 60
    learned = jobs_of(["headline"], predictor="a/predictor")
    assert {case.lemo.get("predictor") for case in learned} == {None, "a/predictor"}


@pytest.mark.soak
def test_a_run_gives_tables_and_a_picture(base, texts, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        *("--out", str(out), "--base", str(base), "--texts", str(texts), "--cpu"),
        *("--group", "smoke", "more", "--tokens", str(TOKENS), "--rows", "1", "--windows", "1"),
        *("--processes", "1", "--threads", "1"),
        *("--jobs", "lexical 1K, overlap 0.3, 4 s", "text 1K, base"),
    ]
    run.main(command)
    assert "overlap 0.3" in capsys.readouterr().out
    found = results.read_rows([out])
    assert [row["status"] for row in found] == ["ok", "ok"], (out / "gpu0.log").read_text()
    run.main(command)  # all is done
    assert len((out / results.RESULTS).read_text().splitlines()) == 2
    trained = next(row for row in found if row["arm"] != "base")
    seeds = [{**trained, "seed": i, "name": trained["name"][:-1] + str(i)} for i in (1, 2)]
    seeds[1] |= {"steps": 8}
    failed = {**trained, "name": "lost", "status": "failed: so"}
    with open(out / results.RESULTS, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*seeds, failed])
    output = tmp_path / "quality.json"
    results.main([str(out), "--output", str(output)])
    tables.main([str(output)])
    page = capsys.readouterr().out
    assert "| overlap 0.3 |" in page and "- lost: failed: so" in page
    assert tables.spread([1.0, 2.0], ".1f") == "1.5 (1.0–2.0)"
    image = tmp_path / "quality.png"
    plots.main([str(output), str(image), "--tokens", str(TOKENS)])
    assert image.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no job"):
        plots.plot(found, image, 1, "")


def test_a_job_without_training_tells_what_the_base_knows(feed, base, texts, tmp_path):
    setup = Setup(base, texts, tmp_path, cpu=True, rows=1, windows=1)
    experiments = Experiments(setup, feed, CPU)
    row = experiments.run(replace(job(task="summary"), arm="base", steps=None, seconds=0))
    assert "steps" in row and row["steps"] is None and row["asked"][str(TOKENS)]["summary"]
    with pytest.raises(ValueError, match="either seconds or steps"):
        job(seconds=1.0)
