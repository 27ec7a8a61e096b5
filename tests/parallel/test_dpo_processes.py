"""DPO by DDP and FSDP2: two processes train as one does with the same pairs a step."""

import pytest
from support.processes import launch
from support.training_cases import assert_same, read

pytest.importorskip("trl", minversion="1.16")

from support.dpo import preferences
from support.dpo_cases import CASES, train

TRAIN = """
import os
from pathlib import Path
from support.dpo import preferences  # noqa: E402
from support.dpo_cases import CASES, train
from support.training_cases import write
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
for name in CASES:
    for engine in ("ddp", "fsdp"):
        write(folder, f"{name}-{engine}", train(folder, name, engine), process)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    preferences().save_to_disk(folder / "pairs")
    launch(TRAIN, folder, [2])
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one(case, engine, two, tmp_path):
    preferences().save_to_disk(tmp_path / "pairs")
    assert_same(read(two, f"{case}-{engine}"), train(tmp_path, case), 1e-4)
