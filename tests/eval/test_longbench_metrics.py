"""LongBench's metrics and scorer: equal to the packages, and to the scores, of the original."""

import difflib
import json
import logging
import random
import shutil
import sys
import warnings

import pytest
from rouge import Rouge
from support.paths import ROOT

from lemo_hf.eval import longbench_metrics as metrics
from lemo_hf.eval.longbench_score import score_folder, score_row, score_rows
from lemo_hf.eval.longbench_tasks import TASKS

DATA = ROOT / "tests" / "data" / "longbench"
PIECES = ["a", "the", "b", "B", "cat.", "dog", " . ", "..", "12", "，", "北京大学", "。", "#", "`"]


def random_text(source, longest=25):
    joiner = source.choice(["", " ", "\n"])
    return joiner.join(source.choice(PIECES) for _ in range(source.randint(0, longest)))


def real_texts(name, field):
    lines = (DATA / "rows" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[field] for line in lines]


def by_rouge(prediction, answer):
    try:
        scores = Rouge().get_scores([prediction], [answer], avg=True)
    except ValueError:  # one of them is empty
        return 0.0
    return scores["rouge-l"]["f"]


def test_rouge_is_that_of_the_package():
    source = random.Random(0)
    pairs = [(random_text(source), random_text(source)) for _ in range(1500)]
    # Few different words, so that which longest common subsequence is taken matters.
    pairs += [
        (
            " ".join(source.choices("abcdefghijkl.", k=30)),
            " ".join(source.choices("abcdefghijkl.", k=30)),
        )
        for _ in range(500)
    ]
    news, answers = (real_texts("multi_news", field) for field in ("context", "answers"))
    pairs += [(text[:1500], answer[0]) for text in news for answer in answers]
    pairs += [(answers[0][0], answers[1][0]), ("", "a"), (".", "a"), (" ", "a"), ("a", " . ")]
    scores = [metrics.rouge(*pair) for pair in pairs]
    assert scores == [by_rouge(*pair) for pair in pairs]
    assert len({round(score, 6) for score in scores}) > 50


def test_a_sentence_longer_than_the_recursion_limit():
    """Only every other word is common: half of the way through the table is no match."""
    answer = [f"w{i}" for i in range(1200)]
    prediction = [word if i % 2 else f"x{i}" for i, word in enumerate(answer)]
    before = sys.getrecursionlimit()  # others raise it
    sys.setrecursionlimit(1000)
    try:
        score = metrics.rouge(" ".join(prediction), " ".join(answer))
    finally:
        sys.setrecursionlimit(before)
    assert score == pytest.approx(0.5, abs=1e-7)


def test_code_sim_is_fuzzywuzzys_ratio(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fuzzywuzzy import fuzz
    # What it takes by itself, unless python-Levenshtein is installed, which gives another ratio.
    monkeypatch.setattr(fuzz, "SequenceMatcher", difflib.SequenceMatcher)
    source = random.Random(0)
    letters = "ab =(){};\t"
    for longest in (12, 300):  # difflib leaves out frequent letters of texts of 200 or more
        for _ in range(200):
            line, answer = (
                "".join(source.choices(letters, k=source.randint(0, longest))) for _ in range(2)
            )
            assert metrics.code_sim(line, answer) == fuzz.ratio(line, answer) / 100


def test_code_sim_takes_the_first_line_of_code():
    assert metrics.code_sim("\n\n```python\n# a\n// b\nx = 1\ny = 2", "x = 1") == 1.0
    assert metrics.code_sim("\n \nx = 1", "x = 1") == 0.33  # of the line that is one blank
    assert metrics.code_sim("# a", "x = 1") == 0.0
    assert metrics.code_sim("# a", "") == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The cat, a dog!", "cat dog", 1.0),
        ("a cat and a cat", "cat cat dog", 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("theatre", "the atre", 0.0),
        ("it's", "its", 1.0),
        ("", "", 0.0),
    ],
)
def test_qa_f1(prediction, answer, score):
    assert metrics.qa_f1(prediction, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Paragraph 3", "Paragraph 3", 1.0),
        ("3 or 13 or 3", "Paragraph 3", 2 / 3),
        ("03", "Paragraph 3", 0.0),
        ("３", "Paragraph 3", 0.0),  # a digit, but another one
        ("none", "Paragraph 3", 0.0),
    ],
)
def test_retrieval_and_count(prediction, answer, score):
    assert metrics.retrieval(prediction, answer) == score
    assert metrics.retrieval_zh(prediction, answer.replace("Paragraph ", "段落")) == score
    assert metrics.count(prediction, answer.removeprefix("Paragraph ")) == score
    with pytest.raises(ValueError, match="'the third' names no Paragraph and its number"):
        metrics.retrieval(prediction, "the third")


def test_classification():
    classes = ["Food", "Sport", "Sport event", "event"]
    assert metrics.classification("Food", "Food", classes) == 1.0
    assert metrics.classification("Food or Sport", "Food", classes) == 0.5
    assert metrics.classification("Sport", "Food", classes) == 0.0
    # "Sport" and "event" are parts of the answer's name and do not count.
    assert metrics.classification("Sport event", "Sport event", classes) == 1.0
    # The benchmark's oddity: "Sport" is removed, so that "Sports" behind it is not looked at.
    odd = ["Sport", "Sports", "Sports day"]
    assert metrics.classification("Sports day", "Sports day", odd) == 0.5
    with pytest.raises(ValueError, match="all_classes is empty"):
        metrics.classification("Food", "Food", None)


def test_chinese_words():
    assert metrics.qa_f1_zh("答案：北京大学。", "“北京大学”") == pytest.approx(2 / 3)
    # 》 is punctuation to the benchmark, 《 is not: it is a word here.
    assert metrics.qa_f1_zh("《北京大学》", "北京大学") == pytest.approx(2 / 3)
    assert metrics.rouge_zh("我在北京大学。你在这里", "我在北京大学。") > 0.7


def test_chinese_scores_without_jieba(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match=r'pip install "lemo-hf\[zh\]"'):
        score_row("dureader", "北京", ["北京"])


def test_all_nine_metrics_are_in_use():
    assert {task.metric for task in TASKS.values()} == set(metrics.METRICS)
    assert len(metrics.METRICS) == 9


def copied(folder, tasks=None):
    """The predictions that the benchmark's own scorer scored."""
    folder.mkdir()
    for path in (DATA / "scored").glob("*.jsonl"):
        if tasks is None or path.stem in tasks:
            shutil.copy(path, folder)
    return folder


def same(ours, theirs):
    assert list(ours) == [task for task in TASKS if task in theirs]
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)  # NaN is NaN


def test_scores_are_those_of_the_benchmarks_scorer(tmp_path):
    """Golden numbers: see tests/data/longbench/README.md."""
    folder = copied(tmp_path / "run")
    golden = json.loads((DATA / "scored" / "result.json").read_text())
    assert len(golden) == 21
    same(score_folder(folder), golden)
    same(json.loads((folder / "result.json").read_text()), golden)


def test_buckets_are_those_of_the_benchmarks_scorer(tmp_path):
    """Golden numbers: see tests/data/longbench/README.md. An empty bucket is NaN."""
    golden = json.loads((DATA / "scored" / "result_e.json").read_text())
    folder = copied(tmp_path / "run", golden)
    same(score_folder(folder, extended=True), golden)
    text = (folder / "result.json").read_text()
    same(json.loads(text), golden)
    assert '"8k+": NaN' in text


def row(prediction, answer, length=100, classes=None):
    return {"pred": prediction, "answers": [answer], "all_classes": classes, "length": length}


def test_first_lines_buckets_and_the_best_answer():
    assert score_row("triviaqa", "\n\nParis\nLondon", ["London", "Paris"]) == 1.0
    assert score_row("hotpotqa", "Paris\nLondon", ["Paris"]) < 1.0
    assert score_row("hotpotqa", "Paris", []) == 0.0
    rows = [row("1", "1", 3999), row("1", "2", 4000), row("2", "2", 7999), row("3", "3", 8000)]
    assert score_rows("passage_count", rows) == 75.0
    classed = [row("a", "a", classes=["b"]), row("a", "a", classes=["a", "b"])]
    assert score_rows("trec", classed) == 100.0  # the last row's classes are those of all rows
    buckets = {"0-4k": 100.0, "4-8k": 50.0, "8k+": 100.0}
    assert score_rows("passage_count", rows, extended=True) == buckets


def test_what_cannot_be_scored_is_named(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        score_folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no predictions"):
        score_folder(tmp_path)
    path = tmp_path / "trec.jsonl"
    path.write_text('{"pred": "a", "answers": ["a"], "all_classes": ["a"]}\n\n')
    assert score_folder(tmp_path) == {"trec": 100.0}
    with pytest.raises(ValueError, match="trec, row 1 has no field 'length'"):
        score_folder(tmp_path, extended=True)
    path.write_text('{"pred": "a", "answers": ["a"], "all_classes": null}\n')
    with pytest.raises(ValueError, match="all_classes is empty"):
        score_folder(tmp_path)
    path.write_text('{"pred": "a", "answers": "a", "all_classes": ["a"]}\n')
    with pytest.raises(ValueError, match="'answers' must be list, got str"):
        score_folder(tmp_path)
    path.write_text('{"pred": "a", "ans')
    with pytest.raises(ValueError, match=r"trec.jsonl, line 1 is not valid JSON"):
        score_folder(tmp_path)
    path.write_text("")
    with pytest.raises(ValueError, match="no prediction of trec"):
        score_folder(tmp_path)
    (tmp_path / "trec.old.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"trec.jsonl and trec.old.jsonl are both of trec"):
        score_folder(tmp_path)
    path.rename(tmp_path / "qa.jsonl")
    with pytest.raises(ValueError, match="LongBench has no task 'qa', its tasks are: narrativeqa"):
        score_folder(tmp_path)


def test_an_unfinished_run_is_said_to_be_one(tmp_path, caplog):
    (tmp_path / "passage_count.jsonl").write_text(json.dumps(row("1", "1")) + "\n")
    (tmp_path / "settings.json").write_text('{"settings": {}, "rows": {"passage_count": 3}}')
    with caplog.at_level(logging.WARNING):
        assert score_folder(tmp_path) == {"passage_count": 100.0}
    assert "passage_count is unfinished: 1 of 3 rows" in caplog.text
