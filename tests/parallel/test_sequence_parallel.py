"""One sequence over several processes: they train as one process does that has all of it."""

import pytest
from support.ddp_cases import RESUMES
from support.models import make_model
from support.processes import launch
from support.sequence_cases import ALL, PASSES, REFUSED, SAVED, by_rows, one_pass
from support.training_cases import (
    assert_same,
    outcome,
    read,
)

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core.checks import check_trainer


def alone(folder, resume=None, **case):
    """What one process makes of a case, row by row."""
    return outcome(by_rows(folder, 1, resume, **case))


START = """
import os
from pathlib import Path
from support.ddp_cases import RESUMES
from support.sequence_cases import ALL, FSDP, PASSES, SAVED, by_rows, one_pass
from support.training_cases import outcome, write
import torch.distributed as dist
from support.processes import meet
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
number = int(os.environ["WORLD_SIZE"])

def trained(name, resume=None, **case):
    trainer = by_rows(folder / name, 2, resume, **case)
    write(folder, f"{number}-{name}", outcome(trainer), process)
    return trainer
"""
PASS = (
    START
    + """
meet()
for name in PASSES:
    write(folder, f"{number}-{name}", one_pass(name, number), process)
write(folder, f"{number}-lora", one_pass("recompute_full", number, lora=True), process)
"""
)
TRAIN = (
    START
    + """
for name, case in ALL.items():
    trainer = trained(name, **case)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    assert trainer.get_total_train_batch_size(trainer.args) == 4
for name in ("lora-answers", "full-lengths"):
    trainer = trained(f"fsdp-{name}", **ALL[name], **FSDP)
    assert trainer.accelerator.is_fsdp2
trained("saved", **SAVED)
if RESUMES:
    trained("resumed", str(folder / "saved" / "checkpoint-2"), **SAVED)
"""
)
GROUPS = (
    START
    + """
for name in ("lora-answers", "full-lengths"):
    trained(name, **ALL[name])
trained("streamed", streamed=True, **ALL["lora-answers"])
"""
)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.soak)])
def passes(request, tmp_path_factory):
    """Single passes by two or by four processes (which have two key heads): how many, a folder."""
    folder = tmp_path_factory.mktemp("passes")
    launch(PASS, folder, [request.param])
    return request.param, folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what two processes trained that share each row, and two pairs of such."""
    folder = tmp_path_factory.mktemp("trained")
    launch(TRAIN, folder, [2])
    launch(GROUPS, folder, [4])
    return folder


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_that_of_one_process(passes, name):
    processes, folder = passes
    assert_same(read(folder, f"{processes}-{name}"), one_pass(name), 2e-5)


def test_with_adapters(passes):
    processes, folder = passes
    assert_same(read(folder, f"{processes}-lora"), one_pass("recompute_full", lora=True), 2e-5)


@pytest.mark.soak
@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one(trained, tmp_path, name):
    assert_same(read(trained, f"2-{name}"), alone(tmp_path, **ALL[name]))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["lora-answers", "full-lengths"])
def test_parameters_shared_out_as_well(trained, tmp_path, name):
    assert_same(read(trained, f"2-fsdp-{name}"), alone(tmp_path, **ALL[name]))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["lora-answers", "full-lengths"])
def test_two_pairs_take_rows_of_their_own(trained, tmp_path, name):
    expected = alone(tmp_path, **ALL[name])
    assert_same(read(trained, f"4-{name}"), expected)
    if name == "lora-answers":
        assert_same(read(trained, "4-streamed"), expected)


@pytest.mark.soak
def test_they_resume_what_they_saved_and_what_one_process_saved(trained, tmp_path):
    uninterrupted = alone(tmp_path, **SAVED)
    assert_same(read(trained, "2-saved"), uninterrupted)
    if RESUMES:
        assert_same(read(trained, "2-resumed"), uninterrupted)
    other = alone(tmp_path / "alone", str(trained / "saved" / "checkpoint-2"), **SAVED)
    assert_same(other, uninterrupted)


SHARES = """
from lemo_hf.batch.selection import kept_set
from lemo_hf.parallel.sequence_parallel import Shards, sequence_group
meet()
shards = Shards(sequence_group(2), 70, 8)
found = []
for kept in ([3, 5, 6, 7, 8], [0, 1, 2], [8]):
    blocks = torch.zeros(1, 9, dtype=torch.bool)
    blocks[0, kept] = True
    tokens = blocks.repeat_interleave(8, 1)[:, :70]
    share = shards.share(kept_set(tokens, blocks, int(tokens.sum()), True, shared=False))
    positions = share.index + shards.bounds[process]
    work = share.spread(positions[..., None].float())
    assert torch.equal(work[..., 0].long(), share.work.index)
    assert torch.equal(share.collect(work)[..., 0].long(), positions)
    found.append([share.index.shape[1], share.work.index.shape[1]])
(folder / str(process)).write_text(repr(found))
"""


def test_kept_rows_are_shared_out_equally(tmp_path):
    """Each holds what it has of the kept rows, and works on half of them, in order."""
    launch("import torch\n" + START + SHARES, tmp_path, [2])
    # Of blocks 0 to 3, and of 4 to 8, the last of which has 6 tokens.
    assert (tmp_path / "0").read_text() == "[[8, 19], [24, 12], [0, 3]]"
    assert (tmp_path / "1").read_text() == "[[30, 19], [0, 12], [6, 3]]"


def test_refusals(tmp_path):
    script = START + "from support.sequence_cases import REFUSED, refuse\nmeet()\n"
    script += "for name in REFUSED:\n    (folder / f'{name}{process}').write_text(refuse(name))\n"
    launch(script, tmp_path, [2])
    for name, (*_, said) in REFUSED.items():
        for process in range(2):
            error = (tmp_path / f"{name}{process}").read_text()
            assert said in error, name
            assert "sequence_parallel_size=2" in error, name


def test_one_process_cannot_share():
    with pytest.raises(ValueError, match="multiple of 2 processes, and there are 1.*accelerate"):
        apply_lemo(make_model("llama", "sdpa"), LeMoConfig(sequence_parallel_size=2))


def test_accelerates_own_is_refused_with_the_way_to_ours():
    class Parallelism:
        sp_size = 2

    class Arguments:
        n_gpu = 1

    with pytest.raises(ValueError, match=r"LeMoConfig\(sequence_parallel_size=2\)"):
        check_trainer(Arguments(), Parallelism())
