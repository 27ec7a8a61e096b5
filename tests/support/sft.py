"""TRL's SFTTrainer, or ours, with the demo's tokenizer and a tiny model."""

import pytest

from support.models import make_model, with_lora
from support.paths import DEMO

trl = pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from lemo_hf.integrations.trl import LeMoSFTTrainer  # noqa: E402

TEXT = (DEMO / "text/heldout-oh-money-money.txt").read_text(encoding="utf-8")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
    "{% endif %}{% endfor %}"
)


def tokenizer():
    found = AutoTokenizer.from_pretrained(DEMO / "model")
    found.chat_template = TEMPLATE
    return found


def texts(rows=24):
    """Pieces of a book, each of another length."""
    return [TEXT[5000 + 700 * i :][: 60 + 23 * (i % 7)] for i in range(rows)]


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def data(kind):
    if kind == "text":
        return Dataset.from_dict({"text": texts()})
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts()]
    if kind == "completion":
        return Dataset.from_list([{"prompt": p, "completion": c} for p, c in halves])
    return Dataset.from_list([{"messages": turns(p, c) + turns(c, p)} for p, c in halves])


def model(lora=True):
    tiny = make_model("llama", vocab_size=2048)
    return with_lora(tiny) if lora else tiny


def make_trainer(tmp_path, config=None, kind="text", cls=LeMoSFTTrainer, **arguments):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    options = {"model": arguments.pop("model", None) or model()}
    for name in ("peft_config", "compute_loss_func", "eval_dataset", "callbacks"):
        if name in arguments:
            options[name] = arguments.pop(name)
    if cls is LeMoSFTTrainer:
        options["lemo_config"] = config
    return cls(
        args=trl.SFTConfig(**{**settings, **arguments}),
        train_dataset=data(kind),
        processing_class=tokenizer(),
        **options,
    )
