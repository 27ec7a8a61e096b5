"""The shape of the repository: who imports whom, and folders that other packages must survive."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A module imports from lower floors only.
FLOORS = {
    "version": 0,
    "files": 0,
    "shown": -1,
    "json_lines": 1,
    "outputs": 0,
    "checkpoints": 1,
    "modes": 0,
    "announce": 0,
    "plain_pickle": 0,
    "compiled": 0,
    "altered": 0,
    "attention": 0,
    "offload": 0,
    "lora": 0,
    "kernels.launch": -1,
    "kernels.rows": 0,
    "kernels.norm": 0,
    "kernels.gather_norm": 2,
    "kernels.scatter_add": 2,
    "kernels.rotary": 1,
    "kernels.gated_activation": 1,
    "kernels.segment_losses": 0,
    "kernels.segment_cross_entropy": 1,
    "predictors.training_free": -1,
    "predictors.overlap": 1,
    "predictors.rarity": 0,
    "predictors.base_model": 1,
    "predictors.asked_shares": 1,
    "predictors.model_card": 1,
    "predictors.predictor_files": 2,
    "predictors.block_predictor": 2,
    "predictors.on_hub": 3,
    "predictors.predictor_set": 3,
    "config_checks": 0,
    "config": 1,
    "families": 1,
    "selection": 0,
    "sequence_parallel": 1,
    "sequence_attention": 2,
    "attention_call": 3,
    "sequence_checks": 2,
    "checks": 2,
    "row_counts": 1,
    "batch_facts": 2,
    "describe": 2,
    "tally": 2,
    "budget": 3,
    "sparse_pass": 4,
    "levels": 5,
    "fused": 2,
    "recompute": 1,
    "memory": 2,
    "out_of_memory": 2,
    "loss": 5,
    "kept_inputs": 5,
    "policies": 5,
    "query_key": 0,
    "load_predictor": 4,
    "observe": 6,
    "looked_at": 7,
    "recall": 10,
    "sublayer": 3,
    "labels": 6,
    "lazy_logits": 0,
    "own_loss": 6,
    "passes": 7,
    "layer": 8,
    "cuda_graphs": 8,
    "recorded_pass": 4,
    "capture": 0,
    "replayed": 1,
    "patch": 9,
    "trainer": 11,
    "train_predictor": 10,
    "text_rows": 2,
    "measure": 10,
    "calibrate": 12,
    "eval.token_files": 1,
    "eval.weights": 0,
    "eval.longbench_tasks": 0,
    "eval.longbench_metrics": 1,
    "eval.longbench_load": 2,
    "eval.longbench_score": 3,
    "eval.longbench_files": 4,
    "eval.metric": 4,
    "eval.token_losses": 10,
    "eval.generation": 10,
    "eval.longbench_prompt": 10,
    "eval.longbench": 11,
    "eval.perplexity": 11,
    "eval.needle_text": 3,
    "eval.needles": 4,
    "eval.retrieval": 10,
    "eval.plots": 1,
    "plan_model": 2,
    "plan_quantized": 3,
    "plan_layer": 3,
    "plan_kept": 4,
    "plan_offload": 4,
    "plan_step": 6,
    "plan": 7,
    "report_environment": 1,
    "report_checks": 1,
    "report_data": 2,
    "report_figures": 0,
    "report": 3,
    "report_callback": 10,
    "integrations.callback": 10,
    "integrations.trl": 12,
    "integrations.axolotl": 11,
    "inspection": 11,
    "inspection_row": 2,
    "inspection_words": 5,
    "inspection_kept": 12,
    "inspection_plots": 12,
    "inspection_kept_plots": 13,
    "cli.positions": 11,
    "cli.adapter": 11,
    "cli.merging": 11,
    "cli.loading": 1,
    "cli.options": 12,
    "cli.train_config": 13,
    "cli.yaml_text": 13,
    "cli.env": 13,
    "cli.inspect": 14,
    "cli.report": 13,
    "cli.train_settings": 14,
    "cli.train_model": 14,
    "cli.train_folder": 15,
    "cli.train_run": 16,
    "cli.train_rows": 14,
    "cli.train": 17,
    "cli.merge": 15,
    "cli.evaluate": 13,
    "cli.plan": 13,
    "cli.calibrate": 13,
    "cli.train_predictor": 13,
    "cli.app": 18,
    "cli.__main__": 19,
}
# Optional packages, inside functions, where they are what a module is about.
ALLOWED = {
    "eval.plots": {"matplotlib"},
    "eval.metric": {"evaluate"},
    "cli.adapter": {"peft"},
    "cli.train_config": {"peft"},
    "cli.train_model": {"peft"},
    "cli.merge": {"peft"},
    "inspection_plots": {"matplotlib"},
    "inspection_kept_plots": {"matplotlib"},
    "integrations.trl": {"trl"},
}


def modules():
    for path in (ROOT / "lemo_hf").glob("*.py"):
        if path.stem != "__init__":
            yield path.stem, path
    for folder in ("cli", "eval", "integrations"):
        for path in (ROOT / "lemo_hf" / folder).glob("*.py"):
            if path.stem != "__init__":
                yield f"{folder}.{path.stem}", path
    for folder in ("kernels", "predictors"):
        for path in (ROOT / folder).glob("*.py"):
            yield f"{folder}.{path.stem}", path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_down():
    for name, path in modules():
        assert name in FLOORS, f"give {name} a floor"
        for imported in imports(path):
            if imported.startswith("lemo_hf."):
                below = imported.removeprefix("lemo_hf.")
                assert FLOORS[below] < FLOORS[name], f"{name} imports {below}"


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


def test_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    for name, path in modules():
        assert f"{path.name}" in readme, f"README's file tree lacks {name}"
