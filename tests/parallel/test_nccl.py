"""What the tests of two processes on the CPU compare, on two and four GPUs through NCCL.

One process on one GPU is what several are compared with, by the same kernels.
"""

from functools import cache

import pytest
import torch
from support.nccl_cases import ENGINES, PASSES
from support.processes import ON_GPUS, launch
from support.training_cases import assert_same, read

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
GPUS = torch.cuda.device_count()
SEVERAL = [
    2,
    pytest.param(4, marks=pytest.mark.skipif(GPUS < 4, reason="needs four CUDA GPUs")),
]
# fp32; GPUs add up in another order.
TOLERANCE = 1e-4


SCRIPT = f"""
import logging
import os
os.environ["{ON_GPUS}"] = "1"
from pathlib import Path
import torch.distributed as dist
from support.processes import meet
from support.nccl_cases import ENGINES, PASSES, Refuse
from support.sequence_cases import FSDP, by_rows, one_pass
from support.training_cases import outcome, train, write
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
number, engine = int(os.environ["WORLD_SIZE"]), folder.name
if engine != "fsdp":
    os.environ.pop("ACCELERATE_USE_FSDP", None)
if engine == "graphs":
    logging.getLogger("lemo_hf.graphs.cuda_graphs").addHandler(Refuse())
for name, case in ENGINES.get(engine, {{}}).items():
    path, case = folder / f"{{number}}-{{name}}", {{"use_cpu": False, **case}}
    if engine == "sequence":
        result = outcome(by_rows(path, number, **case))
    elif engine == "fsdp" and number > 1:
        result = train(path, **FSDP, **case)
    else:
        result = train(path, **case)
    write(folder, path.name, result, process)
if engine == "passes":
    meet()
    for name in PASSES:
        write(folder, f"{{number}}-{{name}}", one_pass(name, number), process)
assert dist.get_backend() == "nccl" and dist.get_world_size() == number
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The folder of what so many processes made of an engine's cases; made when asked for."""

    folder = tmp_path_factory.mktemp("nccl")

    @cache
    def of(engine, number):
        (folder / engine).mkdir(exist_ok=True)
        launch(SCRIPT, folder / engine, [number], timeout=300)
        return folder / engine

    return of


@pytest.mark.parametrize("number", SEVERAL)
@pytest.mark.parametrize("name", PASSES)
def test_a_shared_sequence_is_that_of_one_gpu(outcomes, name, number):
    one, several = (read(outcomes("passes", n), f"{n}-{name}") for n in (1, number))
    assert_same(several, one, TOLERANCE)


@pytest.mark.parametrize("number", SEVERAL)
@pytest.mark.parametrize(
    ("engine", "name"), [(engine, name) for engine, cases in ENGINES.items() for name in cases]
)
def test_several_gpus_train_as_one(outcomes, engine, name, number):
    one, several = (read(outcomes(engine, n), f"{n}-{name}") for n in (1, number))
    assert_same(several, one, TOLERANCE)
