"""Trainings whose ranks keep different tokens, to be run by any number of processes.

Four rows a step however many processes share them. SGD without clipping: a gradient that is wrong
by a factor shows in the weights, which Adam or clipping would hide.
"""

import json

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer
from support.models import make_model, with_lora

ROWS_A_STEP = 4
# Labels of a step's rows, of 64 tokens: two processes have 14 and 114 of them, or 0 and 114.
# Where 50 tokens have one, more than half of the blocks are kept.
ANSWERS = [[10, 4, 64, 50], [0, 0, 64, 50]]
LENGTHS = [29, 40, 64, 33]  # the first has a block of 8 for each of four processes
CHECKPOINTED = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


def rows(kind):
    generator = torch.Generator().manual_seed(3)
    samples = []
    for i in range(48):
        ids = torch.randint(3, 97, (64,), generator=generator)
        labels = ids.clone()
        if kind == "answers":
            labels[: 64 - ANSWERS[i // ROWS_A_STEP % 2][i % ROWS_A_STEP]] = -100
        if kind == "scattered" and i % ROWS_A_STEP < 2:
            labels[::3] = -100  # of the first process: a label in each block, so it keeps all
        length = LENGTHS[i % ROWS_A_STEP] if kind == "padded" else 64
        samples.append({"input_ids": ids[:length], "labels": labels[:length]})
    return samples


def padded(samples):
    """Pads to the longest row of a process, so that processes differ in their width as well."""
    widest = max(len(sample["input_ids"]) for sample in samples)
    batch = {}
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        column = [
            sample.get(name, torch.ones_like(sample["input_ids"])).tolist() for sample in samples
        ]
        batch[name] = torch.tensor([row + [fill] * (widest - len(row)) for row in column])
    return batch


class InOrder(LeMoTrainer):
    """Rows come in their order, so that one knows what a process gets of each step."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def let_fsdp_begin(args):
    """If ``args`` ask for it: processes that have met by gloo are said to be on GPUs.

    accelerate gives FSDP to processes on GPUs only: AcceleratorState (accelerate/state.py, 966 to
    1014 in 1.15) looks at its plugin if distributed_type is MULTI_GPU or another device's.
    MULTI_CPU is not among them, and the model becomes DDP's without a word. All that follows is
    accelerate's own.
    """
    met = args.distributed_state.distributed_type is not DistributedType.NO
    if args.fsdp and met:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def make_trainer(
    output,
    *,
    lora,
    lemo=None,
    data="whole",
    lora_options=None,
    model_options=None,
    **arguments,
):
    """The trainer of one case; its model and data are the same in all processes."""
    AcceleratorState._reset_state()  # the last case's
    settings = {
        "output_dir": str(output),
        "max_steps": 3,
        "learning_rate": 0.5,
        "optim": "sgd",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        "report_to": "none",
    }
    model = make_model("llama", **(model_options or {}))
    torch.manual_seed(0)
    if lora:
        model = with_lora(model, **(lora_options or {}))
    args = TrainingArguments(**{**settings, **arguments})
    args.per_device_train_batch_size = ROWS_A_STEP // args.world_size
    let_fsdp_begin(args)
    return InOrder(
        model=model,
        args=args,
        train_dataset=rows(data),
        data_collator=padded,
        lemo_config=LeMoConfig(**{"block_size": 8, "segment_size": 16, **(lemo or {})}),
    )


def whole(tensor):
    """A parameter's value, put together if processes hold parts of it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def outcome(trainer):
    """Losses, and the trained weights; all processes must ask together."""
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    trained = [pair for pair in trainer.model.named_parameters() if pair[1].requires_grad]
    return losses, {name: whole(parameter) for name, parameter in trained}


def train(output, resume=None, **case):
    """Runs one case to its end; its outcome."""
    trainer = make_trainer(output, **case)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


def again(trainer, **options):
    """The outcome of another trainer of the same model and data, without LeMo unless asked."""
    common = {name: getattr(trainer, name) for name in ("model", "args", "train_dataset")}
    newest = InOrder(**common, data_collator=padded, **options)
    newest.train()
    return outcome(newest)


def write(folder, name, result, process):
    if process == 0:
        save_file({k: v.contiguous() for k, v in result[1].items()}, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(result[0]))


def read(folder, name):
    losses = json.loads((folder / f"{name}.json").read_text())
    return losses, load_file(folder / f"{name}.safetensors")


def assert_same(actual, expected, tolerance=1e-5):
    """Same losses, same weights; ``tolerance`` is absolute for weights, relative for losses."""
    torch.testing.assert_close(
        torch.tensor(actual[0]), torch.tensor(expected[0]), rtol=tolerance, atol=0
    )
    assert actual[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(
            actual[1][name],
            tensor,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n} {m}",
        )
