"""TRL's DPOTrainer, or ours, with the demo's tokenizer and a tiny model; and DPO written anew."""

import pytest
import torch

from support.dense_reference import masked_dense
from support.training_cases import let_fsdp_begin

trl = pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from lemo_hf import LeMoConfig  # noqa: E402
from lemo_hf.integrations.trl_dpo import LeMoDPOTrainer  # noqa: E402
from support.sft import TEXT, model, tokenizer  # noqa: E402

BETA = 0.1


def preferences(rows=8):
    """Pairs of another length each; of every fourth the completions are nearly all."""
    found = []
    for i in range(rows):
        text = TEXT[5000 + 900 * i :]
        prompt = text[: 10 if i % 4 == 3 else 240 + 30 * i]
        found.append(
            {
                "prompt": prompt + " ",
                "chosen": text[500 : 560 + 17 * i],
                "rejected": text[700 : 830 - 11 * i],
            }
        )
    return Dataset.from_list(found)


def make_trainer(tmp_path, config=None, cls=LeMoDPOTrainer, **arguments):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "beta": BETA,
    }
    options = {
        "model": arguments.pop("model", None) or model(),
        "train_dataset": arguments.pop("train_dataset", None) or preferences(),
    }
    for name in ("ref_model", "peft_config", "eval_dataset", "callbacks"):
        if name in arguments:
            options[name] = arguments.pop(name)
    if issubclass(cls, LeMoDPOTrainer):
        options["lemo_config"] = config
    args = trl.DPOConfig(**{**settings, **arguments})
    let_fsdp_begin(args)
    return cls(
        args=args,
        processing_class=tokenizer(),
        **options,
    )


def moved_on(trainer):
    """The trainer with a policy that has left its reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return trainer


def batch_of(trainer, rows=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])


def one_step(trainer, batch=None):
    """Loss, figures and gradients of one batch, in training mode."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, batch or batch_of(trainer))
    loss.backward()
    figures = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), figures, gradients_of(trainer)


def gradients_of(trainer):
    return {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }


def dense_logps(model, layers, batch, masks):
    """Sums of the completions' log-probabilities by a stock model with tokens masked."""
    mode = model.training
    model.eval()
    with masked_dense(layers, masks, "mlp"):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(mode)
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (logps * batch["completion_mask"][:, 1:]).sum(1)


def sigmoid_loss(policy, reference):
    """The loss of the DPO paper, of log-probabilities of chosen and then rejected rows."""
    ratios = policy - reference
    chosen, rejected = ratios.chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


FULL = LeMoConfig(retention=1.0, block_size=8)
HALF = LeMoConfig(retention=0.5, block_size=8, chunk_size=16)


def other():
    """A full model to train, and a reference that is not it."""
    reference = model(lora=False)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    return {"model": model(lora=False), "ref_model": reference.eval()}


MODELS = {
    "adapter": lambda: {"model": model()},
    "new-adapter": lambda: {
        "model": model(lora=False),
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
    },
    "ref_model": other,
}


def logs(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]
