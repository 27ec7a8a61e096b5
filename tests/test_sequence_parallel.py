"""One sequence over several processes: they train as one process does that has all of it."""

import os

import pytest
import torch
import torch.distributed as dist
from models import batch, loss_and_gradients, make_model, with_lora
from processes import device, launch
from test_ddp import RESUMES
from training_cases import CHECKPOINTED, ROWS_A_STEP, assert_same, make_trainer, outcome, read

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.config import LEVELS
from lemo_hf.core.checks import check_trainer
from lemo_hf.predictors.block_predictor import BlockPredictor

EACH = {"policy": "pooled", "agree_across_layers": False, "retention": 0.4}
RECENT = {"policy": "recent"}  # the last process holds nearly all kept rows, another hardly any
# 70 tokens are 9 blocks: the last one is short, and shards differ.
PASSES = {
    "default": ("llama", {}),
    "everything": ("llama", {"retention": 1.0}),
    "own_sets": ("llama", {**EACH, "mlp_retention": 0.3}),
    "thresholds": ("llama", {"threshold": 1.0, "agree_across_layers": False}),
    "dense_layers": ("llama", {**RECENT, "dense_first_layers": 1, "dense_last_layers": 1}),
    "random": ("llama", {**EACH, "policy": "random"}),
    "predictor": ("llama", {**EACH, "policy": "predictor"}),
    "all_labels": ("llama", {"supervise": "all"}),
    "some_labels": ("llama", EACH),
    "overlap": ("llama", {"policy": "overlap", "retention": 0.4}),
    "chunks": ("llama", {**EACH, "policy": "chunks"}),
    **{f"recompute_{level}": ("llama", {**RECENT, "recompute": level})
       for level in LEVELS[1:]},
    "offload": ("llama", {**EACH, "recompute": "selective", "offload_gib": 1}),
    "qwen3": ("qwen3", EACH),
    "granite": ("granite", {**EACH, "recompute": "full"}),
    "olmo2": ("olmo2", EACH),
    "phi3": ("phi3", EACH),
    "glm4": ("glm4", EACH),
    "cohere": ("cohere", {**EACH, "recompute": "full"}),
    "gpt_neox": ("gpt_neox", EACH),
    "qwen3_moe": ("qwen3_moe", {**EACH, "recompute": "selective"}),
}  # fmt: skip


def one_pass(name, processes=1, lora=False):
    """Loss, and the gradient of every parameter, of one row on ``processes`` processes."""
    family, options = PASSES[name]
    model = make_model(family, "sdpa")
    if lora:
        model = with_lora(model)
    model.to(device())
    predictors = None
    if options.get("policy") == "predictor":
        torch.manual_seed(4)
        predictors = [BlockPredictor(32, 8, rank=4) for _ in range(4)]
        for predictor in predictors:
            for parameter in predictor.parameters():
                parameter.data.normal_(0, 0.3)
    config = LeMoConfig(block_size=8, segment_size=16, sequence_parallel_size=processes, **options)
    apply_lemo(model, config, predictors)
    row = {key: value[:1].to(device()) for key, value in batch().items()}
    if name in ("some_labels", "overlap"):
        row["labels"][:, :50] = -100  # the first of two processes has no label
    loss, gradients = loss_and_gradients(model, **row)
    if processes > 1:  # as engines do
        total = torch.tensor(loss, device=device())
        for tensor in (total, *gradients.values()):
            dist.all_reduce(tensor)
            tensor /= processes
        loss = total.item()
    return [loss], {key: value.cpu() for key, value in gradients.items()}


TRAINED = {
    "pooled": {"lemo": EACH},
    "dense": {"lemo": {"retention": 1.0}},
    "recent": {"lemo": RECENT},
    "answers": {"lemo": EACH, "data": "answers"},
    "lengths": {"data": "padded", "ddp_find_unused_parameters": False, **CHECKPOINTED},
    "full": {"lemo": {**EACH, "recompute": "full", "offload_gib": 1}, "data": "answers"},
    "means": {"lemo": EACH, "data": "whole", "average_tokens_across_devices": False},
}
SDPA = {"model_options": {"implementation": "sdpa"}}
ALL = {f"{what}-{name}": {"lora": what == "lora", **SDPA, **case}
       for name, case in TRAINED.items() for what in ("lora", "full")}  # fmt: skip
SAVED = {
    **ALL["lora-answers"],
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


class Streamed(torch.utils.data.IterableDataset):
    """Rows that come one after the other."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def by_rows(folder, size=2, resume=None, streamed=False, **case):
    """Trains a case row by row, each shared by ``size`` processes; as many rows a step as ever."""
    groups = int(os.environ.get("WORLD_SIZE", "1")) // size
    case["lemo"] = {**case.get("lemo", {}), "sequence_parallel_size": size}
    trainer = make_trainer(folder, gradient_accumulation_steps=ROWS_A_STEP // groups, **case)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    if streamed:
        trainer.train_dataset = Streamed(trainer.train_dataset)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def alone(folder, resume=None, **case):
    """What one process makes of a case, row by row."""
    return outcome(by_rows(folder, 1, resume, **case))


START = """
import os
from pathlib import Path
from test_ddp import RESUMES
from test_sequence_parallel import ALL, FSDP, PASSES, SAVED, by_rows, one_pass
from training_cases import outcome, write
import torch.distributed as dist
from processes import meet
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


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """A folder with single passes by two and by four processes (which have two key heads)."""
    folder = tmp_path_factory.mktemp("passes")
    launch(PASS, folder, [2, 4])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what two processes trained that share each row, and two pairs of such."""
    folder = tmp_path_factory.mktemp("trained")
    launch(TRAIN, folder, [2])
    launch(GROUPS, folder, [4])
    return folder


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_that_of_one_process(passes, name, processes):
    assert_same(read(passes, f"{processes}-{name}"), one_pass(name), 2e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_with_adapters(passes, processes):
    assert_same(read(passes, f"{processes}-lora"), one_pass("recompute_full", lora=True), 2e-5)


@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one(trained, tmp_path, name):
    assert_same(read(trained, f"2-{name}"), alone(tmp_path, **ALL[name]))


@pytest.mark.parametrize("name", ["lora-answers", "full-lengths"])
def test_parameters_shared_out_as_well(trained, tmp_path, name):
    assert_same(read(trained, f"2-fsdp-{name}"), alone(tmp_path, **ALL[name]))


@pytest.mark.parametrize("name", ["lora-answers", "full-lengths"])
def test_two_pairs_take_rows_of_their_own(trained, tmp_path, name):
    expected = alone(tmp_path, **ALL[name])
    assert_same(read(trained, f"4-{name}"), expected)
    if name == "lora-answers":
        assert_same(read(trained, "4-streamed"), expected)


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


THREE = {"num_attention_heads": 3, "num_key_value_heads": 3}
REFUSED = {
    "heads": ({**THREE, "hidden_size": 48}, {}, {}, "does not divide the 3 attention heads"),
    "eager": ({"implementation": "eager"}, {}, {}, "attn_implementation='eager'"),
    "oracle": ({}, {"policy": "oracle"}, {}, "policy='oracle'"),
    "opt": ({"model_type": "opt"}, {}, {}, "learned positions"),
    "batch": ({}, {}, {"rows": 2}, "the batch has 2: set per_device_train_batch_size=1"),
    "short": ({}, {}, {"tokens": 8}, "8 tokens has fewer blocks"),
    "padding": ({}, {}, {"padding": 5}, "padding and masks"),
    "packed": ({}, {}, {"document": 30}, "packed documents"),
    "positions": ({"model_type": "ministral3"}, {}, {}, "reads more than its rows"),
    "window": ({"model_type": "mistral"}, {}, {}, "a sliding window of 24"),
    "no_labels": ({}, {}, {"labels": False}, "labels that it is given"),
}


def refuse(name):
    """The error of one case; empty if there is none."""
    model_options, options, row, _ = REFUSED[name]
    try:
        model = make_model(**{"model_type": "llama", "implementation": "sdpa", **model_options})
        apply_lemo(model, LeMoConfig(block_size=8, sequence_parallel_size=2, **options))
        inputs = batch(row.get("rows", 1), row.get("tokens", 70))
        if "padding" in row:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][:, : row["padding"]] = 0
        if "document" in row:
            inputs["position_ids"] = torch.arange(70)[None] % row["document"]
        if "labels" in row:
            del inputs["labels"]
        model(**inputs)
    except ValueError as error:
        return str(error)
    return ""


def test_refusals(tmp_path):
    script = START + "from test_sequence_parallel import REFUSED, refuse\nmeet()\n"
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
