"""What the tests of two processes on the CPU compare, on two and four GPUs through NCCL.

One process on one GPU is what several are compared with, by the same kernels.
"""

import logging
from functools import cache

import pytest
import test_ddp
import test_fsdp_trainer
import test_sequence_parallel
import torch
from processes import ON_GPUS, launch
from training_cases import assert_same, read

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
ENGINES = {
    "ddp": test_ddp.ALL,
    "fsdp": test_fsdp_trainer.ALL,
    "sequence": test_sequence_parallel.ALL,
    # DDP too, whose buckets are filled by gradients that come all at once.
    "graphs": {
        "lora" if lora else "full": {
            "lora": lora,
            "lemo": {"cuda_graphs": True},
            "model_options": {"implementation": "sdpa"},
            "max_steps": 5,
        }
        for lora in (True, False)
    },
}
PASSES = [name for name in test_sequence_parallel.PASSES if name != "qwen3_moe"]
GPUS = torch.cuda.device_count()
SEVERAL = [
    2,
    pytest.param(4, marks=pytest.mark.skipif(GPUS < 4, reason="needs four CUDA GPUs")),
]
# fp32; GPUs add up in another order.
TOLERANCE = 1e-4


class Refuse(logging.Handler):
    """What is warned of is an error: that a batch ran without a graph."""

    def emit(self, record):
        raise AssertionError(record.getMessage())


SCRIPT = f"""
import logging
import os
os.environ["{ON_GPUS}"] = "1"
from pathlib import Path
import torch.distributed as dist
from processes import meet
from test_nccl import ENGINES, PASSES, Refuse
from test_sequence_parallel import FSDP, by_rows, one_pass
from training_cases import outcome, train, write
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
