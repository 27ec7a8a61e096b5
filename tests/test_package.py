"""What users install: the sdist, the wheel made of it, and its extras."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, PathDistribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with the sdist and the wheel."""
    # A copy: what earlier builds left in the checkout would get into this one.
    source = tmp_path_factory.mktemp("source") / "lemo-hf"
    source.mkdir()
    forget = shutil.ignore_patterns("__pycache__")
    for name in ("lemo_hf", "kernels", "predictors"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=forget)
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    output = tmp_path_factory.mktemp("dist")
    # Makes the wheel of the sdist, so one that lacks a file is found by the wheel's tests.
    run("-m", "build", "--no-isolation", "--outdir", output, source)
    return output


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A directory with the wheel's package and scripts and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel)
    return target


def run(*command, path=()):
    """Python with ``command`` outside the checkout, ``path`` before all else it imports from."""
    paths = [*map(str, path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def package_files():
    """Every file of the package, by its name in a wheel; links are followed."""
    return {
        os.path.relpath(os.path.join(folder, name), ROOT): Path(folder, name).read_bytes()
        for folder, _, names in os.walk(ROOT / "lemo_hf", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }


def test_the_wheel_holds_the_package(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("lemo_hf/")}
    expected = package_files()
    assert held.keys() == expected.keys()
    changed = [name for name in held if held[name] != expected[name]]
    assert not changed
    for name in (
        "py.typed",
        "kernels/scatter_add.py",
        "predictors/predictor_set.py",
        "presets/llama3-8b-64k.yaml",
        "report/templates/report.html.j2",
        "eval/longbench_data/dataset2prompt.json",
        "integrations/trl.py",
    ):
        assert f"lemo_hf/{name}" in held


def test_the_sdist_holds_the_package_and_no_links(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        members = {member.name.split("/", 1)[-1]: member for member in sdist.getmembers()}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert package_files().keys() <= members.keys()
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"} <= members.keys()


def test_the_import_is_light(installed):
    code = (
        "import sys, lemo_hf; print(lemo_hf.__file__); lemo_hf.LeMoConfig()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    file, heavy = run("-c", code, path=[installed]).splitlines()
    assert Path(file).is_relative_to(installed)
    assert heavy == "[]"


def test_the_lazy_names_import(installed):
    code = (
        "import lemo_hf\n"
        "for name in lemo_hf.__all__: getattr(lemo_hf, name)\n"
        "import lemo_hf.kernels.norm as kernel, lemo_hf.predictors.on_hub as on_hub\n"
        "print(kernel.__file__, on_hub.__file__, sep='\\n')"
    )
    for file in run("-c", code, path=[installed]).splitlines()[-2:]:
        assert Path(file).is_relative_to(installed)


def test_the_command_runs(installed):
    script = installed / "bin" / "lemo"
    assert "train-predictor" in run(script, "--help", path=[installed])


def test_a_preset_is_read(installed):
    code = (
        "from lemo_hf.cli.train_settings import find_config, read_settings\n"
        "print(find_config('demo-cpu'))\n"
        "print(read_settings('demo-cpu').values['lemo']['retention'])"
    )
    file, retention = run("-c", code, path=[installed]).splitlines()
    assert Path(file).is_relative_to(installed)
    assert 0 < float(retention) < 1


def test_extras_name_packages_that_exist_at_these_versions(installed):
    (info,) = installed.glob("lemo_hf-*.dist-info")
    metadata = PathDistribution(info)
    extras = set(metadata.metadata.get_all("Provides-Extra"))
    requirements = [Requirement(line) for line in metadata.requires]
    pins = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in map(Requirement, constraint_lines())
    }
    assert {"peft", "eval", "plot", "all", "test"} <= extras
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name == "lemo-hf":  # one extra made of others
            assert requirement.extras <= extras, requirement
            continue
        found = [pins[name]] if name in pins else []
        try:
            found.append(version(name))
        except PackageNotFoundError:
            assert found, f"{requirement} is neither installed nor in constraints.txt"
        for known in found:
            assert requirement.specifier.contains(known), f"{requirement}, but it is {known}"


def constraint_lines():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]
