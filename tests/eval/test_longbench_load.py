"""LongBench's tasks, and their rows from folders, archives and the Hub."""

import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.longbench_rows import ROOT, as_lines, row

from lemo_hf.eval.longbench_load import load_task
from lemo_hf.eval.longbench_metrics import METRICS
from lemo_hf.eval.longbench_tasks import DATA as CONFIG
from lemo_hf.eval.longbench_tasks import TASKS, choose_tasks

PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def test_the_table_is_the_benchmarks():
    lengths = json.loads((CONFIG / "dataset2maxlen.json").read_text())
    prompts = json.loads((CONFIG / "dataset2prompt.json").read_text(encoding="utf-8"))
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == lengths
    assert {name: task.prompt for name, task in TASKS.items()} == prompts
    assert len(TASKS) == 21 and len(choose_tasks(extended=True)) == 13
    assert {name for name, task in TASKS.items() if not task.chat_template} == PLAIN
    first_lines = {name for name, task in TASKS.items() if task.first_line}
    assert first_lines == {"trec", "triviaqa", "samsum", "lsht"}
    assert [name for name, task in TASKS.items() if task.stops_at_newline] == ["samsum"]
    assert all(task.metric in METRICS for task in TASKS.values())
    assert (
        "MIT License\n\nCopyright (c) 2023 THU-KEG & Zhipu AI" in (CONFIG / "LICENSE").read_text()
    )


@pytest.mark.parametrize(
    ("file", "digest"),
    [
        ("dataset2prompt.json", "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30"),
        ("dataset2maxlen.json", "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022"),
    ],
)
def test_prompts_and_lengths_are_word_for_word(file, digest):
    """Digests of the files of LongBench's commit 2e00731f8d0bff23dc4325161044d0ed8af94c1e."""
    assert hashlib.sha256((CONFIG / file).read_bytes()).hexdigest() == digest


def test_tasks_are_named():
    assert [task.name for task in choose_tasks(["lcc", "qasper"])] == ["qasper", "lcc"]
    with pytest.raises(ValueError, match="LongBench has no task 'squad', its tasks are: narrativ"):
        choose_tasks(["squad"])
    with pytest.raises(ValueError, match="LongBench-E has no task 'musique'"):
        choose_tasks(["musique"], extended=True)
    with pytest.raises(ValueError, match="no task was named: leave tasks out for all 21"):
        choose_tasks([])


def test_folders_and_archives(tmp_path):
    rows, other = [row("plain"), row("separator \u2028 in it", ["b"])], [row("extended")]
    (tmp_path / "lcc.jsonl").write_bytes(as_lines(rows))
    (tmp_path / "trec.jsonl.xz").write_bytes(lzma.compress(as_lines(rows)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "trec_e.jsonl.gz").write_bytes(gzip.compress(as_lines(other)))
    assert load_task("lcc", tmp_path) == load_task("trec", str(tmp_path)) == rows
    assert load_task("trec", tmp_path, extended=True) == other
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", as_lines(rows))
        archive.writestr("data/lcc_e.jsonl", as_lines(other))
    assert load_task("lcc", tmp_path / "data.zip") == rows
    assert load_task("lcc", tmp_path / "data.zip", extended=True) == other
    assert len(os.listdir(tmp_path)) == 4  # nothing was unpacked
    with pytest.raises(FileNotFoundError, match="there is no qasper.jsonl in .* compressed as"):
        load_task("qasper", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the archive .*data.zip' has no qasper_e.jsonl"):
        load_task("qasper", tmp_path / "data.zip", extended=True)
    with pytest.raises(FileNotFoundError, match="there is no folder or archive"):
        load_task("qasper", tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"lcc.jsonl is neither a folder nor a zip archive"):
        load_task("lcc", tmp_path / "lcc.jsonl")
    with pytest.raises(ValueError, match="revision 'main' names a version of the Hub's data"):
        load_task("lcc", tmp_path, revision="main")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("context"), "row 2 has no field 'context', its fields are: input, answ"),
        (lambda r: r.pop("all_classes"), "row 2 has no field 'all_classes'"),
        (lambda r: r.update(answers="a"), "row 2: 'answers' must be list, got str"),
        (lambda r: r.update(length=None), "row 2: 'length' must be int, got NoneType"),
    ],
)
def test_rows_that_lack_something(change, message, tmp_path):
    rows = [row("a"), row("b")]
    change(rows[1])
    (tmp_path / "lcc.jsonl").write_bytes(as_lines(rows))
    with pytest.raises(ValueError, match=message):
        load_task("lcc", tmp_path)


def test_files_that_are_broken(tmp_path):
    path = tmp_path / "lcc.jsonl"
    for content, message in ((b"", "has no row"), (b'{"a": 1}\n{"a', "line 2 is not valid JSON")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_task("lcc", tmp_path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(ValueError, match="line 1 must be an object, got list"):
        load_task("lcc", tmp_path)


class HubOfOneFile(BaseHTTPRequestHandler):
    """What the Hub's client asks of a data set's repository for one file."""

    archive: bytes

    def do_GET(self):
        found = self.path == "/datasets/zai-org/LongBench/resolve/main/data.zip"
        known = found or "/resolve/main/" in self.path
        self.send_response(200 if found else 404)
        headers = {"ETag": '"1"', "X-Repo-Commit": "0" * 40} if found else {}
        code = "EntryNotFound" if known else "RevisionNotFound"
        headers |= {"Content-Length": len(self.archive) if found else 0}
        headers |= {} if found else {"X-Error-Code": code}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(self.archive)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


HUB_USER = """
from lemo_hf.eval.longbench_load import load_task
print(len(load_task("lcc")), load_task("lcc", extended=True)[0]["context"])
try:
    load_task("lcc", revision="nothing")
except OSError as error:
    print(error)
"""


def test_the_hubs_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", as_lines([row("a"), row("b")]))
        archive.writestr("data/lcc_e.jsonl", as_lines([row("extended")]))
    content = (tmp_path / "data.zip").read_bytes()
    server = HTTPServer(("127.0.0.1", 0), type("Hub", (HubOfOneFile,), {"archive": content}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    run = [sys.executable, "-c", HUB_USER]
    try:
        online = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert online.stdout.splitlines() == [
        "2 extended",
        "'zai-org/LongBench' has no branch, tag or commit 'nothing'.",
    ], online.stderr[-2000:]


def test_without_a_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="not in the Hub's cache.*HF_HUB_OFFLINE.*or give data"):
        load_task("lcc")
