"""Scripts in several processes, launched as `accelerate launch` does."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed
from torch.multiprocessing import start_processes

ROOT = Path(__file__).parent.parent
ON_GPUS = "LEMO_TESTS_ON_GPUS"  # in the environment of processes that are to use GPUs and NCCL
# Imported once, by a server of which processes are forks; each would need seconds for them.
IMPORTED = ["lemo_hf.trainer", "peft", "torch._dynamo", "torch.distributed.fsdp",
            "transformers.models.llama.modeling_llama"]  # fmt: skip
multiprocessing.set_forkserver_preload(IMPORTED)
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


def written(script, folder, processes):
    """The file of ``script``."""
    path = folder / f"script{processes}.py"
    path.write_text(BEGIN + script + END)
    return path


def start(script, folder, processes, timeout=180):
    """Runs ``script`` with ``folder`` as its argument, by torchrun; the ended torchrun."""
    packages = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(packages)}
    run = ["torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    return subprocess.run(
        [sys.executable, "-m", *run, str(written(script, folder, processes)), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _enter(process, path, folder, environment):
    """A fork becomes process number ``process`` of those that torchrun would start."""
    gc.freeze()  # what is imported: Trainer collects garbage before it trains
    os.environ.clear()
    os.environ.update(environment, RANK=str(process), LOCAL_RANK=str(process))
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [path, folder]
    runpy.run_path(path, run_name="__main__")


def fork(script, folder, processes, timeout=180):
    """Runs ``script`` as `start` does, by forks; raises the error of the process that has one."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # they meet at `store`, as at torchrun's
    }
    arguments = (str(written(script, folder, processes)), str(folder), environment)
    context = start_processes(_enter, arguments, processes, join=False, start_method="forkserver")
    end = time.monotonic() + timeout
    while not context.join(max(0.0, end - time.monotonic())):  # false too when one has ended
        if time.monotonic() >= end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{processes} processes ran for more than {timeout} s")


def launch(script, folder, processes=(1, 2), timeout=180):
    """Runs ``script`` to its end by each of these numbers of processes."""
    for number in processes:
        if torch.cuda.is_available():  # a process that may have asked for GPUs must not be forked
            ended = start(script, folder, number, timeout)
            assert ended.returncode == 0, ended.stderr[-8000:]
        else:
            fork(script, folder, number, timeout)
