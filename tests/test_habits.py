"""What contributors are told to run exists, and is what runs elsewhere."""

import dataclasses
import inspect
import re
import tomllib

import pytest
import yaml
from support.paths import ROOT

import lemo_hf

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
PARTS = "|".join(re.search(r"^lint: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
LINT = "".join(re.findall(rf"^(?:{PARTS}):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE))


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
    assert lemo_hf.__version__ in heading[1]


def test_arguments_of_what_is_exported_begin_with_a_noun():
    """Not with what is said of it: "Of the model", "As for ...", "How ...", "Show ..."."""
    fragment = re.compile(r"(Of|As|See|How|That|Which|What|Where|Likewise|To|For|Such|Show|Put)\b")
    checked = 0
    for name in lemo_hf.__all__:
        exported = getattr(lemo_hf, name)
        members = vars(exported).items() if isinstance(exported, type) else ()
        public = [member for key, member in members if not key.startswith("_")]
        for member in (exported, *public):
            text = inspect.getdoc(member) or ""
            for argument, said in re.findall(r"^ {4}(\*{0,2}\w+): (.*)$", text, re.MULTILINE):
                assert not fragment.match(said), f"{name}, {argument}: {said}"
                checked += 1
    assert checked > 40


def test_each_field_of_the_config_is_described():
    described = re.findall(r"^ {4}(\w+): ", inspect.getdoc(lemo_hf.LeMoConfig), re.MULTILINE)
    fields = [field.name for field in dataclasses.fields(lemo_hf.LeMoConfig)]
    assert [name for name in described if name != "ValueError"] == fields
