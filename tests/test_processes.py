"""Several processes, launched as `accelerate launch` does, end where one does."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from hub_client import make_predictor
from safetensors.torch import load_file
from test_block_predictor import HOW

from lemo_hf import LeMoPredictor

ROOT = Path(__file__).parent.parent


def launch(script, folder):
    """Runs ``script`` in one process, then in two."""
    path = folder / "script.py"
    path.write_text('import sys\nsys.path.insert(0, "tests")\n' + script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for processes in ("1", "2"):
        run = ["torch.distributed.run", "--nproc_per_node", processes, "--standalone"]
        result = subprocess.run(
            [sys.executable, "-m", *run, str(path), str(folder)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]


FIT = """
import torch
from accelerate import PartialState
state = PartialState(cpu=True)
from models import make_model
from test_block_predictor import HOW, ROWS
from lemo_hf.train_predictor import PredictorTraining, train_predictor
torch.manual_seed(0)
how = PredictorTraining(**{**vars(HOW), "batch_size": 2 // state.num_processes})
predictor = train_predictor(make_model("llama"), ROWS, how)
predictor.save_files(f"{sys.argv[1]}/{state.num_processes}-{state.process_index}")
"""


def test_predictors_are_trained_together(tmp_path):
    launch(FIT, tmp_path)
    alone, first, second = (
        LeMoPredictor.from_pretrained(tmp_path / name) for name in ("1-0", "2-0", "2-1")
    )
    assert first.same_as(second)
    assert [p.units for p in alone.attention] == [p.units for p in first.attention]
    assert min(p.units for p in alone.attention) < HOW.units  # counts are summed, and used
    ours, theirs = alone.state_dict(), first.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)


TRAIN = """
import torch
from models import make_model
from lemo_hf import LeMoConfig, LeMoTrainer
from transformers import TrainingArguments
out = sys.argv[1]
args = TrainingArguments(
    output_dir=f"{out}/run", use_cpu=True, max_steps=2, report_to="none", save_strategy="no",
    learning_rate=1e-2, seed=1, disable_tqdm=True,
)
args.per_device_train_batch_size = 2 // args.world_size
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(0, 97, (64,), generator=generator) for _ in range(4)]
torch.manual_seed(0)
trainer = LeMoTrainer(
    model=make_model("llama"),
    args=args,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    lemo_config=LeMoConfig(predictor=f"{out}/predictor", block_size=8),
)
trainer.train()
trainer.save_model(f"{out}/{args.world_size}")
"""


def test_a_model_is_trained_with_one_predictor(tmp_path):
    predictor = make_predictor()
    predictor.save_pretrained(tmp_path / "predictor")
    launch(TRAIN, tmp_path)
    alone, both = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-4, atol=1e-5)
    for name in "12":
        assert LeMoPredictor.from_pretrained(tmp_path / name).same_as(predictor)
