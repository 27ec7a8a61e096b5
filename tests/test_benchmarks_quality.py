"""The quality benchmark: its data, its ways of training, its queue, its tables and pictures."""

import json
import os
import time
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from models import make_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import frontier, make_base, prepare, run, tables
from benchmarks.quality.cases import Cases, chosen_jobs, read_recipe
from benchmarks.quality.data import Data
from benchmarks.quality.experiment import load_model, train
from benchmarks.quality.job import Job
from benchmarks.quality.kinds import nested_sets, s2_attention, subset_gradients
from benchmarks.quality.results import settings_of
from benchmarks.quality.workers import Estimate, Queue, Worker
from benchmarks.record import load, save
from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX

DEMO = Path(__file__).parent.parent / "examples" / "demo"
MODEL, TEXT = DEMO / "model", DEMO / "text"
CPU = torch.device("cpu")
TOKENS = 512
SETS = ("many-lines", "many-lines-half", "many-lines-quarter", "many-answers")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quality")
    prepare.main(
        [
            *(str(path), "--model", str(MODEL)),
            *("--train", str(TEXT / "train-alice-adams.txt")),
            *("--test", f"books={TEXT / 'heldout-oh-money-money.txt'}"),
            f"other={TEXT / 'heldout-the-foresters-daughter.txt'}",
            *("--sets", *SETS, "--tokens", str(TOKENS), "--max-rows", "4", "--windows", "2"),
            *("--samples", "1", "--keys", "2", "--processes", "1"),
        ]
    )
    return path


@pytest.fixture(scope="session")
def data(folder) -> Data:
    return Data.load(folder)


def test_the_base_learns_from_both_sets_in_turns(folder, tmp_path):
    first, second = [f"a{i}" for i in range(3)], [f"b{i}" for i in range(4)]
    turns = make_base.TakingTurns([first, second], batch=2, steps=4)
    assert [turns[i] for i in range(len(turns))] == ["a0", "a1", "b0", "b1", "a2", "a0", "b2", "b3"]
    sets = ["many-lines-quarter", "many-answers"]
    make_base.main(
        [
            *(str(tmp_path / "base"), "--model", str(MODEL), "--data", str(folder)),
            *("--sets", *sets, "--steps", "4", "--batch", "1"),
        ]
    )
    facts = json.loads((tmp_path / "base" / "training.json").read_text())
    assert len(facts["losses"]) == 4 and 0 <= facts["accuracy"] <= 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def job(name: str = "job", **changes) -> Job:
    fields = {"data": "many-lines", "steps": 2, "batch": 1, "learning_rate": 1e-3}
    return Job(**{"name": name, "setting": name, **fields, **changes})


def ids_and_labels(count: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, count))
    return {"input_ids": ids, "labels": ids.clone()}


def test_rows_ask_for_what_they_tell(data):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert {name: rows.ids.shape for name, rows in data.train.items()} == {
        "many-lines": (4, TOKENS),
        "many-lines-half": (8, TOKENS // 2),
        "many-lines-quarter": (16, TOKENS // 4),
        "many-answers": (4, TOKENS),
    }
    assert list(data.test) == ["books", "other"]
    assert all(rows.shape == (2, TOKENS) for rows in data.test.values())
    assert torch.equal(
        *(torch.from_numpy(data.train["many-lines"][0][name]) for name in ("input_ids", "labels"))
    )
    for row in (data.train["many-answers"][place] for place in range(4)):
        labels = row["labels"][row["labels"] != IGNORE_INDEX]
        answers = tokenizer.decode(labels).replace(" ", "")
        assert len(answers) == 2 * 7 and answers.isdigit()  # a line every 256 tokens
        text = tokenizer.decode(row["input_ids"])
        assert all(text.count(value) == 2 for value in (answers[:7], answers[7:]))
    for row in data.needles[7]:
        answer = tokenizer.decode(row.answer_ids).strip()
        assert answer.isdigit() and answer in tokenizer.decode(row.prompt_ids)
    assert {len(row.input_ids) for row in data.needles[7]} == {TOKENS // 4, TOKENS // 2, TOKENS}


def test_training_and_test_texts_are_apart(data):
    """Haystacks come from the books of their side: 32 tokens in a row are found in no other."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    book, held_out = (
        tokenizer.decode(tokenizer((TEXT / name).read_text())["input_ids"])
        for name in ("train-alice-adams.txt", "heldout-oh-money-money.txt")
    )
    for row, home, other in [
        (data.train["many-lines"].ids[1].tolist(), book, held_out),
        (data.needles[7][-1].input_ids, held_out, book),
    ]:
        pieces = [
            tokenizer.decode(row[start : start + 32]) for start in range(0, len(row) - 31, 16)
        ]
        assert sum(piece in home for piece in pieces) > len(pieces) / 4
        assert not any(piece in other for piece in pieces)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_gradients_through_everything_are_dense_ones():
    model, batch = make_model("llama").double(), ids_and_labels()
    dense = model(**batch).loss
    dense.backward()
    expected = gradients(model)
    with subset_gradients(model, LeMoConfig(retention=1.0, block_size=4, policy="random")):
        loss = model(**batch).loss
        loss.backward()
    assert torch.equal(loss, dense)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name]) for name in expected)


def test_gradients_through_a_subset_hold_the_other_tokens_fixed():
    """Against a model in which what projections say of dropped tokens are constants."""
    model, batch = make_model("llama").double(), ids_and_labels()
    kept = torch.zeros(32, dtype=torch.bool)
    kept[:4] = kept[20:] = True  # 4 of 8 blocks: the first always, and the last
    config = LeMoConfig(retention=0.5, block_size=4, policy="recent")
    with subset_gradients(model, config):
        loss = model(**batch).loss
        loss.backward()
    found = gradients(model)
    constants: dict[nn.Module, torch.Tensor] = {}

    def hold(module: nn.Module, _, output: torch.Tensor) -> torch.Tensor:
        if module not in constants:
            constants[module] = output.detach()
        return torch.where(kept[:, None], output, constants[module])

    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hold)
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
    asked = kept[:-1]
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1][:, asked]
    targets = batch["labels"][:, 1:][:, asked]
    expected = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    assert torch.allclose(loss, expected)
    expected.backward()
    for name, gradient in gradients(model).items():
        assert torch.allclose(found[name], gradient), name


def test_subset_gradients_come_off_and_leave_evaluation_alone():
    model, batch = make_model("llama").eval(), ids_and_labels()
    before = model(**batch).loss
    with subset_gradients(model, LeMoConfig(block_size=4, policy="random")):
        assert torch.equal(model(**batch).loss, before)
    model.train()
    model(**batch).loss.backward()
    expected = gradients(model)
    model(**batch).loss.backward()
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model).items())


@pytest.mark.parametrize("policy", ["pooled", "random"])
def test_nested_sets_only_shrink(policy):
    model, batch = make_model("llama"), ids_and_labels(64)
    shares = (0.75, 0.5, 0.5, 0.25)
    config = LeMoConfig(retention=shares, policy=policy, block_size=4, agree_across_layers=False)
    lemo = apply_lemo(model, config)

    def kept_of_a_pass() -> list[torch.Tensor]:
        model(**batch).loss.backward()
        return [lemo.passes.kept_blocks[layer, "attention"] for layer in range(4)]

    with nested_sets():
        kept = kept_of_a_pass()
    assert [blocks.sum(1).tolist() for blocks in kept] == [[16 * s] * 2 for s in shares]
    for before, after in pairwise(kept):
        assert not (after & ~before).any()
    free = kept_of_a_pass()  # without it they choose anew
    assert any((after & ~before).any() for before, after in pairwise(free))


def test_s2_attention_is_for_training_alone():
    model, batch = make_model("llama", "sdpa"), ids_and_labels()
    dense = model(**batch).loss
    with s2_attention(model):
        assert not torch.allclose(model(**batch).loss, dense, rtol=1e-3)
    assert torch.equal(model(**batch).loss, dense)


def test_training_trains_what_the_job_says(data):
    for adapter, trained in (("attention", "self_attn"), ("all-linear", "mlp")):
        model = load_model(job(adapter=adapter), MODEL, TOKENS, CPU)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all("lora" in name for name in names)
        assert any(trained in name for name in names)
        assert adapter == "all-linear" or not any("mlp" in name for name in names)
    full = job(adapter=None, lemo={"retention": 0.5, "policy": "recent"})
    model = load_model(full, MODEL, TOKENS, CPU)
    before = {name: p.clone() for name, p in model.named_parameters()}
    took = train(full, model, data, CPU)
    assert took["attention_retention"] == took["mlp_retention"] == 0.5
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def serve(connection) -> None:
    """A worker whose jobs wait, or kill it."""
    connection.send("ready")
    while (job := connection.recv()) is not None:
        if job.data == "dies":
            os._exit(3)
        begin = time.monotonic()
        time.sleep(30 if job.data == "hangs" else 0.1)
        if job.data == "breaks its GPU":
            connection.send({**job.to_dict(), "status": "failed: CUDA error", "fatal": True})
            return
        row = {**job.to_dict(), "status": "ok", "began": begin, "ended": time.monotonic()}
        connection.send(row | {"step_ms": 100.0 if job.lemo is None else 25.0})


def start(gpu: int) -> Worker:
    context = get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return Worker(gpu, process, here)


def rows_of(jobs: list[Job], seconds: float = 20.0, **options) -> dict[str, dict]:
    estimate = Estimate(dict.fromkeys(("many-lines", "dies", "breaks its GPU", "hangs"), 1), 2)
    estimate.FIXED = 0.2
    end = time.monotonic() + seconds
    queue = Queue(start, options.get("gpus", 2), 2, estimate, end)
    rows = {row["name"]: row for row in queue.run(jobs, options.get("rows", []))}
    assert not any(worker.process.is_alive() for worker in queue.workers)
    return rows


def test_a_process_that_dies_is_a_row_and_the_rest_goes_on():
    jobs = [job(str(i), data="dies" if i < 5 else "many-lines") for i in range(12)]
    rows = rows_of(jobs)
    assert len(rows) == 12
    for i in range(12):
        expected = "failed: its process ended with 3" if i < 5 else "ok"
        assert rows[str(i)]["status"] == expected


def test_a_process_whose_gpu_broke_gets_no_other_job():
    rows = rows_of([job("0", data="breaks its GPU"), *(job(str(i)) for i in range(1, 6))], gpus=1)
    assert rows.pop("0")["status"] == "failed: CUDA error"
    assert [row["status"] for row in rows.values()] == ["ok"] * 5


def test_exclusive_jobs_are_alone_on_their_gpu():
    alone = [job(f"alone {i}", exclusive=True) for i in range(3)]
    rows = rows_of([*alone, *(job(str(i)) for i in range(6))], gpus=1)
    assert len(rows) == 9
    spans = {name: (row["began"], row["ended"]) for name, row in rows.items()}
    for name in (job.name for job in alone):
        begin, end = spans.pop(name)
        assert all(a >= end or b <= begin for a, b in spans.values())


def test_equal_time_takes_its_steps_from_the_timings():
    timings = [job("dense", exclusive=True), job("lemo", lemo={}, exclusive=True)]
    longer = job("longer", lemo={}, steps=10, same_time=("dense", "lemo"))
    lost = job("lost", same_time=("dense", "no such timing"))
    rows = rows_of([*timings, longer, lost])
    assert rows["longer"]["steps"] == 40
    assert longer.same_run(rows["longer"]) and not replace(longer, seed=1).same_run(rows["longer"])
    assert "lost" not in rows
    again = rows_of([longer], rows=[rows["dense"], rows["lemo"]])  # of an earlier run
    assert again["longer"]["steps"] == 40


def test_nothing_starts_or_stays_beyond_the_end():
    begin = time.monotonic()
    rows = rows_of(
        [job("hung", data="hangs"), *(job(str(i)) for i in range(99))], seconds=2, gpus=1
    )
    assert time.monotonic() - begin < 9
    assert rows["hung"]["status"] == "out of time"
    assert 2 < len(rows) < 60
    assert all(row["status"] == "ok" for name, row in rows.items() if name != "hung")


def test_cases_are_settings_that_lemo_takes():
    groups = Cases(read_recipe(), "a-predictor", 12).groups()
    jobs = chosen_jobs(groups, list(groups))
    assert len({job.name for job in jobs}) == len(jobs)
    for case in jobs:
        assert case.data in prepare.SETS
        if case.lemo is not None:
            rules = LeMoConfig(**case.lemo).layer_rules(12)
            if case.kind == "nested":
                shares = [attention.retention for attention, _ in rules]
                assert shares == sorted(shares, reverse=True)
                assert sum(shares) / 12 == pytest.approx(0.5)
                assert case.same_run(json.loads(json.dumps(case.to_dict())))
    names = {job.name for job in jobs}
    assert all(name in names for job in jobs if job.same_time for name in job.same_time)


@pytest.fixture(scope="session")
def short_model(tmp_path_factory) -> Path:
    """The first layers of the demo's model."""
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_pretrained(MODEL, num_hidden_layers=4).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def results(folder, short_model, tmp_path_factory) -> Path:
    """One job of every kind by the command line, and one that cannot run."""
    path = tmp_path_factory.mktemp("results") / "quality.json"
    recipe = read_recipe()
    recipe["headline"] = {
        "pooled 0.5": {"policy": "pooled"},
        "too large": {"policy": "pooled", "dense_first_layers": 99},
    }
    recipe_file = path.with_name("recipe.json")
    recipe_file.write_text(json.dumps(recipe))
    common = [
        "--model",
        str(short_model),
        "--data",
        str(folder),
        "--tiny",
        "--workers-per-gpu",
        "1",
    ]
    common += ["--recipe", str(recipe_file), "--output", str(path), "--commit", "abc1234"]
    groups = ["base", "policy", "sets", "controls", "completion", "headline", "timing"]
    names = ["base", "dense", "pooled 0.5", "pooled, nested 0.5", "S²-Attn", "random-LTD 0.5"]
    names += ["random, gradients only 0.5", "dense, rows 1/2, half the tokens", "too large"]
    names += ["completion, dense", "completion, random 0.3", "time, dense", "time, pooled 0.5"]
    run.main([*common, "--only", *groups, "--jobs", *names])
    names = ["dense", "dense, seed 1", "equal time, pooled 0.5"]
    run.main([*common, "--append", "--only", "headline", "equal_time", "--jobs", *names])
    return path


def test_every_kind_runs(results):
    header, rows = load(results)
    by_name = {row["name"]: row for row in rows}
    assert len(rows) == len(by_name) == 15
    assert by_name.pop("too large")["status"].startswith(
        "failed: ValueError: dense_first_layers=99"
    )
    assert all(row["status"] == "ok" for row in by_name.values())
    assert len(header["commands"]) == 2
    assert header["commands"][0].startswith("python -m benchmarks.quality.run --model")
    dense = by_name["dense"]
    for name, row in by_name.items():
        if row["evaluate"]:
            assert row["perplexity"].keys() == {"books", "other"}
            assert row["retrieval"]["accuracy"].keys() == {"128", "256", "512"}
            assert name == "dense" or row["perplexity"] != dense["perplexity"]
        elif name != "base":
            assert "perplexity" not in row and row["step_ms"] > 0
    assert dense["perplexity"]["books"] < by_name["base"]["perplexity"]["books"]
    assert by_name["random-LTD 0.5"]["attention_retention"] == pytest.approx(0.75, abs=0.01)
    timings = [by_name[f"time, {name}"]["step_ms"] for name in ("dense", "pooled 0.5")]
    assert by_name["equal time, pooled 0.5"]["steps"] == round(3 * timings[0] / timings[1])


def test_settings_meet_their_dense_rows(results):
    _, rows = load(results)
    dense, pooled = settings_of(rows, "headline")
    assert (dense.name, len(dense.rows), pooled.name) == ("dense", 2, "pooled 0.5")
    means = [row["perplexity"]["books"] for row in dense.rows]
    assert dense.mean("perplexity", "books") == pytest.approx(sum(means) / 2)
    (change,) = pooled.changes("perplexity", "books")
    assert change == pytest.approx(pooled.rows[0]["perplexity"]["books"] / means[0] - 1)
    completion = settings_of(rows, "completion")
    assert completion[1].dense == completion[0].rows
    nested = next(s for s in settings_of(rows, "sets") if "nested" in s.name)
    assert nested.peak_gib is None and nested.step_ms is None


def test_tables_and_pictures_come_from_the_json(results, tmp_path, capsys):
    header, rows = load(results)
    rows[0] = rows[0] | {"peak_gib": None}
    tables.main([str(results)])
    text = capsys.readouterr().out
    for title in ("Policies", "Kept sets", "Completion-only", "Headline", "Equal wall-clock"):
        assert f"### {title}" in text
    assert "too large: failed: ValueError" in text and "commit `abc1234`" in text
    dense = next(row for row in rows if row["name"] == "dense")
    books, end = dense["perplexity"]["books"], dense["late_perplexity"]["books"]
    assert f"| dense | 1 | 3 | 1.00 / 1.00 | {books:.2f} ({end:.2f}) |  |" in text
    summary = tables.summary_table(rows, ("headline", "equal_time", "controls"))
    assert summary.count("| dense |") == 1 and "| pooled 0.5, as long as dense |" in summary
    image = tmp_path / "frontier.png"
    frontier.main([str(results), str(image)])
    assert image.stat().st_size > 10_000
    on_gpu = [row | {"peak_gib": 1.5} for row in rows]  # memory has panels of its own
    save(tmp_path / "gpu.json", header, on_gpu)
    wider = tmp_path / "wider.png"
    frontier.main([str(tmp_path / "gpu.json"), str(wider)])
    assert wider.stat().st_size > image.stat().st_size
    with pytest.raises(SystemExit, match="both evaluated and timed"):
        frontier.plot(header, [row for row in rows if row["evaluate"]], image)
