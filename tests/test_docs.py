"""The documentation: its code runs, its links lead somewhere, its messages and figures are real.

A page's ``python`` blocks and ``lemo`` lines run from top to bottom in an empty folder, the Python
in one namespace. Names in them are a reader's; `STAND_INS` says what takes their place here. A
block whose fence says ``title="Needs ..."`` (a GPU, the Hub, an optional package) does not run:
Python is compiled, and the options of ``lemo`` are looked up. That is also all that happens to the
README's ``lemo`` lines and to calls with ``...``, which leave something out.
"""

import ast
import json
import re
import shlex
import sys
from functools import cache

import pytest
import typer
from support.dry_models import _poison  # noqa: F401
from support.paths import ROOT
from support.plans import plan
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from lemo_hf import LeMoConfig
from lemo_hf.cli.app import app
from lemo_hf.config import LEVELS

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ROOTS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MODEL = "examples/demo/model"
STAND_INS = {
    # Models, text and lengths.
    r"meta-llama/[\w.-]+|\bNAME\b": MODEL,
    r"\b(8192|16384|32768|65536|131072|8_192|32_768|65_536)\b": "512",
    # Short runs on a CPU.
    r"max_steps=\d+": "max_steps=1",
    r"max_rows=\d+": "max_rows=4",
    r"bf16=True": "use_cpu=True",
    r"--rows \d\d+": "--rows 3",
    r" --(memory|reserve)-gib \d+": "",  # a search, which tests of the plan make
    r"--heldout-rows \d+": "--heldout-rows 1",
    r"(--config demo-cpu)": r"\1 --training.max_steps 1 --data.max_rows 2 --data.max_eval_rows 1",
}
BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page):
    """Language, whether it is to run, first line and code of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        language, title, code = found.groups()
        runs = not (title or "").startswith("Needs")
        yield language, runs, text.count("\n", 0, found.start()) + 2, code


def lemo_lines(code):
    """Lines that call ``lemo``, continued ones joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"lemo\s+\w", line)]


def substituted(code):
    for pattern, stand_in in STAND_INS.items():
        code = re.sub(pattern, stand_in, code)
    return code


def check_options(line):
    """The command and each of its options exist."""
    command = typer.main.get_command(app)
    words = shlex.split(re.sub(r"[\[\]|]|\.\.\.", " ", line), comments=True)[1:]
    while hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    open_ended = command.context_settings.get("ignore_unknown_options", False)
    for word in words:
        free = open_ended and "." in word  # --section.key of lemo train
        assert not word.startswith("--") or free or word.partition("=")[0] in known, (word, line)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with the examples, documents and answers, and what pages take for given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    texts = sorted((ROOT / "examples" / "demo" / "text").glob("*.txt"))
    lines = [json.dumps({"text": path.read_text(encoding="utf-8")[:6_000]}) for path in texts]
    (tmp_path / "books.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    answers = [
        json.dumps({"prompt": text[start : start + 900], "completion": text[start + 900 :][:60]})
        for text in (json.loads(line)["text"] for line in lines)
        for start in range(0, 5_000, 1_000)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(answers) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(json.loads(lines[0])["text"], verbose=False)["input_ids"]
    return {
        "__name__": "docs",
        "model": AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        "tokenizer": tokenizer,
        "args": TrainingArguments(output_dir="out", max_steps=1, use_cpu=True, report_to="none"),
        "ds": [{"input_ids": ids[:256], "labels": ids[:256]}] * 8,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_a_page(page, reader, lemo):
    for language, runs, line, code in blocks(page):
        where = f"{page.name}:{line}"
        if language == "python":
            outline = re.search(r"\(\.\.\.[,)]", code)
            compiled = compile("\n" * line + substituted(code), where, "exec")
            if runs and not outline:
                exec(compiled, reader)
        elif language == "bash":
            for call in lemo_lines(code):
                check_options(call)
                if runs and page.parent == DOCS:
                    words = shlex.split(substituted(call), comments=True)[1:]
                    status, _, errors = lemo(*words)
                    assert status == 0, (where, call, errors)
        elif language == "json":
            json.loads(code)


def anchors(page):
    """What a forge calls the headings of a page; the site's names are checked by its build."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *ROOTS], ids=lambda page: page.name)
def test_links(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


@cache
def messages():
    """Texts in the source; what is filled in stands as ``…``."""
    found = []
    for folder in ("lemo_hf", "predictors", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                if all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
                    words = [str(getattr(part, "value", "")) for part in parts]
                    holes = [isinstance(part, ast.FormattedValue) for part in parts]
                    pairs = zip(words, holes, strict=True)
                    found.append("".join("…" if hole else word for word, hole in pairs))
    return found


def test_messages_of_troubleshooting_are_in_the_source():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    titles = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(titles) >= 20
    for title in titles:
        assert any(title in message for message in messages()), title


def measured_rows():
    """Cells of each table that is made from the JSON of a benchmark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from table import blocks as tables
        from table import quality_blocks
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    found = {**tables(), "quality": quality_blocks()["quality"]}
    return {name: cells(text) for name, text in found.items()}


def cells(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def in_order(few, many):
    rest = iter(many)
    return all(cell in rest for cell in few)


def test_tables_of_figures_are_the_benchmarks():
    """A table behind ``<!-- from NAME -->`` has rows, or parts of rows, of that benchmark."""
    sources, checked = measured_rows(), 0
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"<!-- from (\w+) -->\n+((?:\|.*\n)+)", text):
            name, table = found.groups()
            for row in cells(table):
                is_rule = set("".join(row)) <= {"-"}
                same = any(in_order(row, source) for source in sources[name])
                assert is_rule or same, (page.name, row)
            checked += 1
    assert checked >= 4


@pytest.mark.soak
def test_the_picture_of_recomputation_is_the_plan():
    text = (DOCS / "assets" / "recompute.svg").read_text(encoding="utf-8")
    shown = [int(kib) for kib in re.findall(r">(\d+) KiB<", text)]
    tokens, stored = 16384, []
    for level in LEVELS:
        config = LeMoConfig(retention=0.5, recompute=level)
        parts = []
        for layers in (32, 64):
            shapes = AutoConfig.for_model(
                "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
                num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
            )  # fmt: skip
            found = plan(shapes, config, tokens, adapter_dtype="bfloat16", autocast=False).parts
            parts.append(sum(size for name, size in found.items() if _of_rows(name)))
        stored.append(round((parts[1] - parts[0]) / 32 / (tokens // 2) / 1024))
    assert shown == stored


def _of_rows(part):
    return part.endswith("rows") or part in ("attention outputs", "sums behind attention")
