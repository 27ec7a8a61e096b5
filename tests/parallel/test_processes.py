"""Several processes, launched as `accelerate launch` does, end where one does."""

import pytest
import torch
from safetensors.torch import load_file
from support.hub_client import make_predictor
from support.processes import launch

from lemo_hf import LeMoPredictor

SCRIPT = """
import torch
from accelerate import PartialState
state = PartialState(cpu=True)
from support.models import make_model
from support.predictor_training import HOW, ROWS
from lemo_hf import LeMoConfig, LeMoTrainer
from lemo_hf.tune.train_predictor import PredictorTraining, train_predictor
from transformers import TrainingArguments
out = sys.argv[1]

torch.manual_seed(0)
how = PredictorTraining(**{**vars(HOW), "batch_size": 2 // state.num_processes})
predictor = train_predictor(make_model("llama"), ROWS, how)
predictor.save_files(f"{out}/{state.num_processes}-{state.process_index}")

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


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with what one process made, and what two did."""
    folder = tmp_path_factory.mktemp("processes")
    make_predictor().save_pretrained(folder / "predictor")
    launch(SCRIPT, folder)
    return folder


def test_predictors_are_trained_together(both):
    alone, first, second = (
        LeMoPredictor.from_pretrained(both / name) for name in ("1-0", "2-0", "2-1")
    )
    assert first.same_as(second)
    ours, theirs = alone.state_dict(), first.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_model_is_trained_with_one_predictor(both):
    alone, two = (load_file(both / name / "model.safetensors") for name in "12")
    for name, tensor in alone.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    given = LeMoPredictor.from_pretrained(both / "predictor")
    for name in "12":
        assert LeMoPredictor.from_pretrained(both / name).same_as(given)
