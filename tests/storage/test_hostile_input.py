"""Files of somebody else: bombs, damage and values of the wrong kind end in one line, at once."""

import bz2
import gzip
import json
import logging
import lzma
import shutil
import time
import zipfile

import pytest
from support.limits import limited
from support.longbench_rows import as_lines, row
from support.paths import MODEL

from lemo_hf import LeMoConfig
from lemo_hf.cli.train_settings import read_settings
from lemo_hf.cli.yaml_text import parse_yaml
from lemo_hf.eval.longbench_load import load_task
from lemo_hf.eval.longbench_score import check_rows, score_folder, score_row
from lemo_hf.shown import MOST_LETTERS, shown
from lemo_hf.storage.files import read_json
from lemo_hf.storage.text_rows import labelled_rows, load_documents

LETTERS = "abcdefgh"


def bomb(first="[x, x, x, x, x, x, x, x, x]", of="[{}]"):
    """Ten lines of which each stands for nine of the one before: 9 ** 9 values."""
    lines = [f"model: &a {first}"]
    for before, name in zip(LETTERS, LETTERS[1:] + "i", strict=True):
        lines.append(f"{name}: &{name} " + of.format(", ".join([f"*{before}"] * 9)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [bomb(), bomb("{k: 1}", "{{<<: [{}]}}"), "[" * 2_000, "model: {name: &a [*a]}"],
    ids=["aliases", "merged", "nested", "itself"],
)
def test_yaml_bombs_end_at_once(text, tmp_path, lemo):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"run.yaml is not valid YAML: (it|the) .*"):
        read_settings(str(path))
    with pytest.raises(ValueError, match="--lemo.retention is not valid YAML"):
        read_settings(None, ["--lemo.retention", text])
    code, _, err = lemo("train", "--config", path)
    assert code == 2 and err.startswith("lemo: ") and err.count("\n") == 1 and len(err) < 400
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("? [a, b]\n: 1", "the key in line 1 is a sequence: keys must be words"),
        ("a: 1\na: 2", "'a' is given twice, again in line 2"),
        ("a: !!bool maybe", "'maybe'"),
        ("a: !!timestamp x", "groupdict"),
        ("a: !!int ''", "index out of range"),
        ("x: " + "1, " * 70_000, None),
    ],
)
def test_yaml_that_is_none(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message or "run.yaml has more than 131,072 bytes"):
        read_settings(str(path))
    if message:
        with pytest.raises(ValueError, match=f"source is not valid YAML: .*{message}"):
            parse_yaml(text, "source")


def test_a_value_is_shown_shortly():
    value = {"a": [1, 2.5, "x", None, True], "b": (1,)}
    assert shown(value) == repr(value)
    for _ in range(40):
        value = [value] * 9
    assert len(shown(value)) <= MOST_LETTERS
    assert len(shown("x" * 10**7)) <= MOST_LETTERS
    assert shown(1 << 20_000) == "<an integer of 20001 bits>"


@pytest.mark.parametrize("value", [10**400, -(10**400), [0.5] * 10**6 + [10**5000], "x" * 10**7])
@pytest.mark.parametrize("name", ["retention", "threshold", "block_size", "seed", "offload_gib"])
def test_numbers_that_are_none(name, value):
    with pytest.raises(ValueError, match=name) as found:
        LeMoConfig(**{"policy": "pooled", name: value})
    assert len(str(found.value)) < 1000


def test_a_config_of_an_older_version(tmp_path, caplog):
    """`normalize_scores` was removed. What it did by default is what is done now."""
    config = LeMoConfig(policy="pooled", retention=0.4)
    values = config.to_dict()
    (tmp_path / "lemo_config.json").write_text(json.dumps({**values, "normalize_scores": False}))
    with caplog.at_level(logging.WARNING):
        assert LeMoConfig.from_pretrained(tmp_path) == config
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert LeMoConfig.from_dict({**values, "normalize_scores": True}) == config
    assert "normalize_scores" in caplog.text and "policy='recent'" in caplog.text
    with pytest.raises(ValueError, match="unknown keys in a LeMoConfig: 3, blocksize. If a newer"):
        LeMoConfig.from_dict({"blocksize": 8, 3: 4})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not valid JSON (it is nested too deeply"),
        (b'{"a": "\\ud800"}', "is not valid JSON ('utf-8' codec can't encode"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not valid JSON (Exceeds the limit"),
        (b"\xff", "is not UTF-8 text"),
        (b"[1]", "must hold a JSON object, got list"),
        (b" " * (2**26 + 1), "has more than 67,108,864 bytes"),
    ],
)
def test_json_that_is_none(content, message, tmp_path):
    path = tmp_path / "lemo_config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as found:
        read_json(path)
    assert f"{path} {message}" in str(found.value)


GOOD = b"".join(json.dumps({"text": f"document {i} " * 30}).encode() + b"\n" for i in range(40))
PACKED = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("damage", ["cut", "changed", "nothing"])
def test_damaged_archives_are_named(suffix, damage, tmp_path):
    packed = PACKED[suffix](GOOD)
    middle = len(packed) // 2
    content = {
        "cut": packed[:-9],
        "changed": packed[:middle] + bytes(16) + packed[middle + 16 :],
        "nothing": b"nothing",
    }[damage]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.jsonl{suffix}"):
        list(load_documents(path))
    if suffix != ".bz2":  # no file of LongBench's
        path.rename(tmp_path / f"lcc.jsonl{suffix}")
        with pytest.raises(ValueError, match=rf"lcc.jsonl{suffix}"):
            load_task("lcc", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed", "encrypted"])
def test_damaged_zips_are_named(damage, tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/lcc.jsonl", as_lines([row(f"text {i}" * 20) for i in range(50)]))
    content = bytearray(path.read_bytes())
    assert len(load_task("lcc", path)) == 50
    if damage == "cut":  # of its end only the mark is left
        content[100:-120] = b""
    elif damage == "changed":
        content[60:90] = bytes(30)
    else:
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data.zip is damaged, or not what its name says \("):
        load_task("lcc", path)


def test_a_line_of_gigabytes_takes_no_gigabytes(tmp_path):
    """A thousandth of it is what the archive takes."""
    line = b'{"input": "' + b" " * 2**28
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lcc.jsonl", line, compresslevel=1)
    (tmp_path / "lcc.jsonl.gz").write_bytes(gzip.compress(line, 1))
    limited(
        "from lemo_hf.eval.longbench_load import load_task\n"
        "from lemo_hf.storage.text_rows import load_documents\n"
        "for read in (lambda: load_task('lcc', 'data.zip'), lambda: load_task('lcc', '.'),\n"
        "             lambda: list(load_documents('lcc.jsonl.gz'))):\n"
        "    try:\n"
        "        read()\n"
        "    except ValueError as error:\n"
        "        assert 'line 1 has more than 67,108,864 bytes' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError\n",
        tmp_path,
        gib=0.25,
    )


def test_rows_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("lemo_hf.eval.longbench_load.MOST_BYTES", 10_000)
    (tmp_path / "lcc.jsonl").write_bytes(as_lines([row("x" * 2000)] * 6))
    with pytest.raises(ValueError, match=r"lcc.jsonl has more than 10,000 bytes"):
        load_task("lcc", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": None}, "line 41: column 'text' must hold text, got NoneType"),
        ({"text": 5}, "line 41: column 'text' must hold text, got int"),
        ({"other": "a"}, "line 41 has no column 'text', its columns are: other"),
        ([1], "line 41 must be an object, got list"),
    ],
)
def test_one_row_that_is_no_text(line, message, tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(GOOD)
    second.write_bytes(GOOD + json.dumps(line).encode() + b"\n" + GOOD)
    with pytest.raises(ValueError) as found:
        list(load_documents([first, second]))
    assert f"{second}, {message}" in str(found.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.jsonl.xz"])
def test_empty_files(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=name):
        list(load_documents(tmp_path / name))
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    assert len(list(load_documents([tmp_path / "b.jsonl", tmp_path / "c.jsonl"]))) == 40


def test_null_of_other_formats(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": null}]')
    with pytest.raises(ValueError, match=r"a.json, row 2: column 'text' must hold text, got None"):
        list(load_documents(tmp_path / "a.json"))
    (tmp_path / "b.jsonl").write_text('{"text": ' + "[" * 100_000)  # which stops pyarrow itself
    with pytest.raises(
        ValueError, match=r"b.jsonl, line 1 is not valid JSON: it is nested too dee"
    ):
        list(load_documents(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "a", "completion": None}, "row 1: column 'completion' must hold text, got Non"),
        ({"prompt": "a"}, "row 1 has no column 'completion'"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 1 has 2 input_ids and 1 labels"),
        ({"input_ids": [1, None], "labels": [1, 2]}, "row 1: column 'input_ids' must be a list of"),
        ({"input_ids": [1]}, "row 1: column 'labels' must be a list of token ids"),
    ],
)
def test_labelled_rows_that_are_none(example, message):
    class Tokenizer:
        bos_token_id = eos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": list(text.encode())}

    with pytest.raises(ValueError, match=message):
        labelled_rows([example], Tokenizer(), 8)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("lcc", {"answers": [5]}, "row 2: 'answers' must hold texts, got 5"),
        ("lcc", {"answers": [None]}, "row 2: 'answers' must hold texts, got None"),
        ("trec", {"all_classes": [["a"]]}, r"row 2: 'all_classes' must hold texts, got \['a'\]"),
        ("lcc", {"length": True}, "row 2: 'length' must be int, got bool"),
    ],
)
def test_answers_that_are_no_text(task, changes, message, tmp_path):
    (tmp_path / f"{task}.jsonl").write_bytes(as_lines([row("a"), {**row("b"), **changes}]))
    with pytest.raises(ValueError, match=message):
        load_task(task, tmp_path)
    made = [{"pred": "a", **row("a"), **one} for one in ({}, changes)]
    (tmp_path / f"{task}.jsonl").write_bytes(as_lines(made))
    with pytest.raises(ValueError, match=message):
        score_folder(tmp_path, extended=True)


def test_answers_that_fit_no_metric():
    """They are found before anything is generated: tests/eval/test_longbench.py."""
    with pytest.raises(ValueError, match="retrieval_en, row 2: the answer 'b' names no Paragraph"):
        check_rows("passage_retrieval_en", [row("", ["Paragraph 1"]), row("", ["b"])])
    with pytest.raises(ValueError, match="trec, row 1: classification needs the names of all"):
        check_rows("trec", [row("")])
    check_rows("trec", [row("", ["a"], ["a", "b"])])


@pytest.mark.parametrize("task", ["gov_report", "lcc"])
def test_what_takes_hours_to_score_is_refused(task):
    with pytest.raises(ValueError, match="shorten the prediction"):
        score_row(task, "a " * 10**6, ["a " * 1000])
    assert score_row("hotpotqa", "a b " * 10**5, ["b"]) < 1e-3


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x80&\0\0\0\0\0\0{"),
        ("config.json", b"[" * 100_000),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[1]"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_damaged_model_is_named(command, file, content, tmp_path, lemo):
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / file).write_bytes(content)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    arguments = ["--model", model, "--dataset", tmp_path / "a.jsonl"]
    if command == "eval":
        code, _, err = lemo("eval", "perplexity", *arguments, "--json")
    else:
        more = ["--full", "--tokens", 64, "--output", tmp_path / "out", "--training.use_cpu"]
        code, _, err = lemo("train", *arguments, *more)
    assert code == 2 and f"lemo: model '{model}' cannot be loaded; one of its files may be" in err
