"""What contributors are told to run exists, and is what runs elsewhere."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from lemo_hf import __version__

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
LINT = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", ".github/workflows/test.yml"])
def test_targets_of_make_exist(page):
    named = set(re.findall(r"(?:`|^|run: )make ([a-z]+)", (ROOT / page).read_text(), re.MULTILINE))
    assert named and named <= TARGETS


def test_the_workflow_takes_the_pythons_that_are_supported():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    pythons = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert needs == f">={pythons[0]}"
    (row,) = re.findall(r"^\| Python \| .*$", (ROOT / "docs" / "support.md").read_text(), re.M)
    assert set(re.findall(r"3\.\d+", row)) == set(pythons)


def test_pre_commit_checks_what_make_lint_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        tool = re.search(r"-m ((?:ruff )?\w+)", hook["entry"])[1]
        assert f"$(RUN) -m {tool}" in LINT
    assert {hook["id"].split("-")[0] for hook in hooks} == {"ruff", "mypy"}


def test_the_changelog_knows_this_version():
    heading = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert __version__ in heading[1]
