"""Scripts in several processes, launched as `accelerate launch` does."""

import os
import subprocess
import sys

import torch
import torch.distributed

from support.paths import ROOT

ON_GPUS = "LEMO_TESTS_ON_GPUS"  # in the environment of processes that are to use GPUs and NCCL
BEGIN = 'import sys\nsys.path.insert(0, "tests")\n'
# A process that ends while another still talks to it may take that one down.
# All is written by then, and gloo's threads may abort a process that takes its libraries down.
END = """
import os
import torch.distributed
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def device():
    """Of this process: its GPU, if it was started with `ON_GPUS`, else the CPU."""
    return torch.device("cuda" if ON_GPUS in os.environ else "cpu")


def meet():
    """Lets the processes of a script find each other, where no Trainer does."""
    if ON_GPUS in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if ON_GPUS in os.environ else "gloo")


def start(script, folder, processes, timeout=180):
    """Runs ``script`` with ``folder`` as its argument, by torchrun; the ended torchrun."""
    path = folder / f"script{processes}.py"
    path.write_text(BEGIN + script + END)
    packages = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(packages)}
    run = ["torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    return subprocess.run(
        [sys.executable, "-m", *run, str(path), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch(script, folder, processes=(1, 2), timeout=180):
    """Runs ``script`` to its end by each of these numbers of processes."""
    for number in processes:
        ended = start(script, folder, number, timeout)
        assert ended.returncode == 0, ended.stderr[-8000:]
