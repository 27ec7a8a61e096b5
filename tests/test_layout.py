"""The shape of the repository: who imports whom, and folders that other packages must survive."""

import ast
import graphlib
import re
import subprocess
import sys

from support.paths import ROOT

# A package, or a module that lies at the root, and those it imports from. No two import each other.
IMPORTS = {
    "version": "",
    "shown": "",
    "modes": "",
    "altered": "",
    "announce": "",
    "progress": "",
    "cards": "",
    "config_checks": "shown",
    "storage": "shown",
    "config": "config_checks shown storage version",
    "kernels": "",
    "predictors": "cards config shown storage version",
    "overrides": "",
    "reported_loss": "",
    "resuming": "config storage",
    "schedule": "",
    "stopwatch": "",
    "run_card": "cards config schedule storage",
    "batch": "config kernels predictors",
    "memory": "batch config kernels",
    "parallel": "altered batch",
    "core": "altered batch config kernels memory parallel predictors",
    "graphs": "altered batch config core kernels",
    "describe": "batch config",
    "load_predictor": "config predictors",
    "check": "config core",
    "lemo": "config core describe kernels load_predictor memory predictors schedule",
    "patch": "check config core describe graphs lemo memory predictors",
    "integrations.callback": "announce config core lemo patch run_card stopwatch",
    "trainer": "announce config core integrations.callback lemo overrides parallel patch "
    "predictors reported_loss resuming run_card stopwatch storage",
    "integrations": "altered config core integrations.callback lemo patch predictors trainer",
    "eval": "kernels modes patch shown storage",
    "tune": "batch config core eval kernels lemo modes patch predictors progress storage",
    "planning": "altered config core kernels memory patch",
    "report": "batch core kernels lemo patch shown storage version",
    "inspection": "config core eval kernels lemo modes patch storage tune",
    "cli": "announce batch config describe eval inspection integrations kernels lemo "
    "load_predictor planning patch predictors progress report run_card shown storage trainer tune",
}
# Optional packages, inside functions, where they are what a module is about.
ALLOWED = {
    "eval.plots": {"matplotlib"},
    "eval.metric": {"evaluate"},
    "cli.adapter": {"peft"},
    "cli.train_config": {"peft"},
    "cli.train_chats": {"trl"},
    "cli.train_look": {"trl"},
    "cli.train_model": {"peft"},
    "cli.train_sft": {"trl"},
    "cli.merge": {"peft"},
    "planning.trained": {"peft"},
    "inspection.layer_plots": {"matplotlib"},
    "inspection.kept_plots": {"matplotlib"},
    "integrations.trl": {"trl"},
    "integrations.trl_dpo": {"trl"},
}


def modules():
    for folder in ("lemo_hf", "lemo_hf/kernels", "lemo_hf/predictors"):  # two of them are links
        for path in (ROOT / folder).rglob("*.py"):
            if path.stem != "__init__":
                yield ".".join(path.relative_to(ROOT / "lemo_hf").with_suffix("").parts), path


def room(name):
    """The package that a module belongs to, or itself."""
    return name if name in IMPORTS else name.split(".")[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imported_modules():
    """Each module, and those of the package that it imports."""
    paths = dict(modules())
    for name, path in paths.items():
        found = set()
        assert "lemo_hf" not in imports(path), f"{name} imports all of the package"
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Import) or "lemo_hf" not in ast.unparse(node), name
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lemo_hf."):
                module = node.module.removeprefix("lemo_hf.")
                inside = {f"{module}.{alias.name}" for alias in node.names}
                found |= {module} if module in paths else inside
        yield name, found


def test_packages_import_what_they_may():
    for name, found in imported_modules():
        assert room(name) in IMPORTS, f"say what {name} may import"
        allowed = {*IMPORTS[room(name)].split(), room(name)}
        wrong = {module for module in found if room(module) not in allowed}
        assert not wrong, f"{name} imports {wrong}"


def test_no_rule_is_idle_and_none_leads_in_a_circle():
    used = {}
    for name, found in imported_modules():
        used.setdefault(room(name), set()).update(map(room, found))
    for name, allowed in IMPORTS.items():
        assert set(allowed.split()) == used[name] - {name}, name
    for graph in ({k: set(v.split()) for k, v in IMPORTS.items()}, dict(imported_modules())):
        tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_kernels_and_predictors_know_no_model():
    for name, path in modules():
        if name.startswith(("kernels.", "predictors.")):
            packages = {imported.split(".")[0] for imported in imports(path)}
            assert not packages & {"transformers", "peft", "accelerate"}, name


def test_the_package_imports_no_optional_package():
    for name, path in modules():
        packages = {imported.split(".")[0] for imported in imports(path)}
        optional = {"peft", "trl", "matplotlib", "evaluate", "liger_kernel"}
        assert not packages & (optional - ALLOWED.get(name, set())), name


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_root_folders_do_not_shadow_the_package_kernels():
    """With an __init__.py here, `import transformers` would take ours for PyPI's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "predictors" / "__init__.py").exists()
    out = run(
        "import importlib.util as u\n"
        "spec = u.find_spec('kernels')\n"
        "print('regular' if spec.origin and 'site-packages' not in spec.origin else 'fine')\n"
        "import transformers.models.llama.modeling_llama\n"
        "import lemo_hf.kernels.rows, lemo_hf.predictors.training_free\n"
    )
    assert out.splitlines()[0] == "fine"


def test_the_config_needs_no_transformers():
    run("import sys, lemo_hf; lemo_hf.LeMoConfig(); assert 'transformers' not in sys.modules")


def test_readme_names_every_package():
    readme = (ROOT / "README.md").read_text()
    for name in {name.split(".")[0] for name, _ in modules()}:
        shown = (f"lemo_hf/{name}.py", f"lemo_hf/{name}/", f"`{name}/`", f"`{name}.py`")
        assert any(x in readme for x in shown), f"README's table lacks {name}"


def test_files_are_short():
    for name, path in modules():
        assert len(path.read_text().splitlines()) <= 350, name


def test_no_test_imports_another():
    """What several of them use lies in tests/support/; scripts of other processes find it there."""
    for path in (ROOT / "tests").rglob("*.py"):
        named = re.findall(r"^\s*(?:from|import) (test_\w+)", path.read_text(), re.MULTILINE)
        assert not named, f"{path.name} imports {named}"


def test_folders_of_tests_are_packages():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= {*IMPORTS, "benchmarks"}
