"""Scripts in several processes, launched as `accelerate launch` does."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait

import torch
import torch.distributed

from support.paths import ROOT

ON_GPUS = "LEMO_TESTS_ON_GPUS"  # a script that is to use GPUs and NCCL sets it in its environment
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
    if ON_GPUS not in script:  # they might be fewer than the processes
        environment["CUDA_VISIBLE_DEVICES"] = ""
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
        if torch.cuda.is_available():  # CUDA lives through no fork
            ended = start(script, folder, number, timeout)
            assert ended.returncode == 0, ended.stderr[-8000:]
        else:
            _fork(script, folder, number, timeout)


# What scripts import, which takes seconds: once, in a process that all others are forked from.
IMPORTED = ["accelerate", "peft", "lemo_hf.trainer", "torch.distributed.fsdp"]


def _fork(script, folder, number, timeout):
    """`start` without torchrun, for a script that must end well."""
    path = folder / f"script{number}.py"
    path.write_text(BEGIN + script + END)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(number)}
    shared |= {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": str(port)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    started, logs = [], [folder / f"{path.name}.{rank}.log" for rank in range(number)]
    for rank, log in enumerate(logs):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(context.Process(target=_run, args=(path, folder, log, own)))
        started[-1].start()
    end, running = time.monotonic() + timeout, list(started)
    while running and all(process.exitcode in (None, 0) for process in started):
        if not wait([process.sentinel for process in running], max(0, end - time.monotonic())):
            break
        running = [process for process in started if process.exitcode is None]
    for process in running:  # another has failed, or time is over
        process.kill()
        process.join()
    said = "\n".join(log.read_text()[-4000:] for log in logs if log.exists())
    assert [process.exitcode for process in started] == [0] * number, said


def _run(path, folder, log, environment):
    """The script, in this process, whose output goes to ``log``."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(path), str(folder)]
    runpy.run_path(str(path), run_name="__main__")
