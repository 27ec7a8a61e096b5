"""`LeMoSFTTrainer` in place of TRL's SFTTrainer, and TRL's other trainers refused by name."""

import pytest
import torch
from support.models import make_model

trl = pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from peft import LoraConfig, PromptTuningConfig  # noqa: E402
from support.sft import data, make_trainer, model, texts, tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    DataCollatorWithFlattening,
    LlamaForSequenceClassification,
    TrainingArguments,
)

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo  # noqa: E402
from lemo_hf.integrations.callback import LeMoCallback  # noqa: E402
from lemo_hf.integrations.trl import LeMoSFTTrainer  # noqa: E402

FULL = LeMoConfig(retention=1.0, block_size=8)
HALF = LeMoConfig(retention=0.5, block_size=8, policy="random")


def logs(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def assert_same_logs(ours, theirs, rel=1e-4):
    assert len(ours) == len(theirs) == 3
    for mine, stock in zip(ours, theirs, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert mine[name] == pytest.approx(stock[name], rel=rel), name


CASES = {
    "padded": {},
    "packed": {"packing": True, "max_length": 96},
    "packed-wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 96},
    "padding-free": {"padding_free": True, "max_length": None},
    "completions": {"kind": "completion"},
    "completions-packed": {"kind": "completion", "packing": True, "max_length": 96},
    "assistant": {"kind": "chat", "assistant_only_loss": True},
    "chat": {"kind": "chat"},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "dft": {"loss_type": "dft"},
}


OLDEST = ("padded", "packed", "completions", "assistant")


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.oldest if x in OLDEST else ()) for x in CASES]
)
def test_retention_1_logs_what_sft_trainer_does(tmp_path, case):
    stock = logs(make_trainer(tmp_path, cls=trl.SFTTrainer, **CASES[case]))
    ours = logs(make_trainer(tmp_path, FULL, **CASES[case]))
    assert_same_logs(ours, stock)
    assert ours[0]["lemo/attention_retention"] == 1


@pytest.mark.oldest
def test_no_config_is_sft_trainer_to_the_bit(tmp_path):
    ours, stock = (
        logs(make_trainer(tmp_path, cls=cls)) for cls in (LeMoSFTTrainer, trl.SFTTrainer)
    )
    assert_same_logs(ours, stock, rel=0)
    assert ours[0].keys() == stock[0].keys()


@pytest.mark.parametrize("case", [name for name in CASES if name != "dft"])
def test_half_of_the_tokens_learns(tmp_path, case):
    settings = {
        **CASES[case],
        "max_steps": 8,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
    }
    found = logs(make_trainer(tmp_path, HALF, **settings))
    losses = [log["loss"] for log in found]
    assert all(0 < loss < 20 for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert found[0]["lemo/attention_retention"] < 0.95


@pytest.mark.parametrize("supervise", ["kept", "all"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_lemo_trainers(tmp_path, supervise, accumulation):
    """SFTTrainer divides by its own count of labels, of which LeMo strikes some."""
    config = LeMoConfig(retention=0.5, block_size=8, policy="random", supervise=supervise)
    settings = {
        "packing": True,
        "max_length": 64,
        "packing_strategy": "wrapped",
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    sft = make_trainer(tmp_path, config, **settings)
    # Rows of one length, as their weights are then one number, which is all that a count can say.
    rows = [row for row in sft.train_dataset if len(row["input_ids"]) == 64]
    sft.train_dataset = Dataset.from_list(rows)
    found = logs(sft)
    args = {name: value for name, value in sft.args.to_dict().items() if name in FIELDS}
    plain = LeMoTrainer(
        model=model(),
        args=TrainingArguments(**args),
        train_dataset=[{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows],
        lemo_config=config,
    )
    for mine, expected in zip(found, logs(plain), strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-4)


FIELDS = {
    "output_dir", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "logging_steps", "save_strategy", "use_cpu", "disable_tqdm", "report_to",
    "seed",
}  # fmt: skip


def test_evaluation_is_dense(tmp_path):
    settings = {"eval_dataset": data("completion"), "kind": "completion"}
    stock = make_trainer(tmp_path, cls=trl.SFTTrainer, **settings).evaluate()
    ours = make_trainer(tmp_path, HALF, **settings).evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours[name] == stock[name]


def test_the_card_of_trl_has_what_trained(tmp_path):
    trainer = make_trainer(tmp_path, HALF)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("## Training with LeMo") == 1 and "## Quick start" in card.text
    assert {"sft", "lemo-hf", "lemo"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"


def test_sft_trainer_makes_the_adapter(tmp_path):
    options = {
        "model": model(lora=False),
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
    }
    trainer = make_trainer(tmp_path, HALF, **options)
    logs(trainer)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert LeMoConfig.from_pretrained(tmp_path) == HALF
    assert {"trl", "sft", "lemo-hf"} <= set(trainer.model.get_base_model().model_tags)


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated")
def test_a_users_own_loss_is_shown_kept_labels(tmp_path):
    seen = []

    def own(outputs, labels, num_items_in_batch=None):
        seen.append((int((labels != -100).sum()), float(num_items_in_batch)))
        return torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )

    settings = {"compute_loss_func": own, "kind": "text", "packing": True, "max_length": 64}
    logs(make_trainer(tmp_path, FULL, **settings))
    everything, seen[:] = list(seen), []
    logs(make_trainer(tmp_path, HALF, **settings))
    for (kept, items), (labels, all_items) in zip(seen, everything, strict=True):
        assert 0 < kept < 0.7 * labels and items < 0.7 * all_items


def test_trl_ways_to_save_memory_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"activation_offloading=True.*offload_gib"):
        make_trainer(tmp_path, HALF, activation_offloading=True)
    with pytest.raises(ValueError, match=r"'selective': True.*recompute='selective'"):
        kwargs = {"selective": True}
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
        make_trainer(tmp_path, HALF, **settings)


def test_experts_auxiliary_loss_is_refused_with_the_way_out(tmp_path):
    def moe():
        return make_model("qwen3_moe", vocab_size=2048)

    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0"):
        make_trainer(tmp_path, HALF, model=moe())
    assert len(logs(make_trainer(tmp_path, HALF, model=moe(), router_aux_loss_coef=0.0))) == 3


def test_sft_trainer_with_apply_lemo_or_the_callback_is_refused(tmp_path):
    ready = model()
    apply_lemo(ready, HALF)
    with pytest.raises(ValueError, match=r"fused_lm_head=True.*LeMoSFTTrainer"):
        make_trainer(tmp_path, cls=trl.SFTTrainer, model=ready).train()
    with pytest.raises(ValueError, match=r"SFTConfig.*LeMoSFTTrainer"):
        make_trainer(tmp_path, cls=trl.SFTTrainer, callbacks=[LeMoCallback(HALF)])


def preferences():
    pairs = [(text[:30], text[30:60], text[60:]) for text in texts(8)]
    rows = [{"prompt": p, "chosen": c, "rejected": r + "."} for p, c, r in pairs]
    return Dataset.from_list(rows)


def small(cls, tmp_path, **settings):
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, **settings}
    return cls(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_plain_dpo_is_refused_with_ours_named(tmp_path):
    ready = model()
    apply_lemo(ready, HALF)
    trainer = trl.DPOTrainer(
        model=ready,
        args=small(trl.DPOConfig, tmp_path),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    with pytest.raises(ValueError, match=r"for DPO.*LeMoDPOTrainer.*remove_lemo"):
        trainer.train()


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def other_trainer(kind, tmp_path, model, callbacks=()):
    """TRL's trainer for rewards, or of single completions."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences()]
    if kind == "KTO":
        rows = [{**row, "label": i % 2 == 0} for i, row in enumerate(rows)]
        more, settings = {}, {}
    else:
        more = {"reward_funcs": length}
        settings = {"num_generations": 2, "max_completion_length": 8}
    args = small(getattr(trl, f"{kind}Config"), tmp_path, **settings)
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **more,
    )


@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "KTO"])
def test_trainers_whose_sampler_or_reference_reads_every_token_are_refused(tmp_path, kind):
    ready = model()
    apply_lemo(ready, HALF)
    before = {name: x.clone() for name, x in ready.state_dict().items()}
    reason = r"KTO; GRPO and RLOO, whose sampler reads every token"
    with pytest.raises(ValueError, match=rf"{reason}.*remove_lemo"):
        other_trainer(kind, tmp_path, ready).train()
    after = ready.state_dict()  # to which TRL may have added a reference
    assert all(torch.equal(after[name], x) for name, x in before.items())
    with pytest.raises(ValueError, match=rf"{kind}Config belongs to.*{reason}"):
        other_trainer(kind, tmp_path, model(), [LeMoCallback(HALF)])


def test_reward_models_are_refused_by_name(tmp_path):
    scorer = LlamaForSequenceClassification(make_model("llama", num_labels=1).config)
    with pytest.raises(ValueError, match="no language-model head"):
        apply_lemo(scorer, HALF)
    with pytest.raises(ValueError, match=r"RewardConfig"):
        trl.RewardTrainer(
            model=scorer,
            args=small(trl.RewardConfig, tmp_path),
            train_dataset=preferences().remove_columns("prompt"),
            processing_class=tokenizer(),
            callbacks=[LeMoCallback(HALF)],
        )


def test_flattening_collators_have_no_longest_row(tmp_path):
    """Each document is shorter than a block, but the row they are flattened to is not."""
    config = LeMoConfig(retention=0.5, block_size=64, policy="random")
    short = make_trainer(tmp_path, config, padding_free=True, max_length=None)
    assert all(len(row["input_ids"]) < 96 for row in short.train_dataset)
    assert len(logs(short)) == 3
    assert not isinstance(short.data_collator, DataCollatorWithFlattening)


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_prompt_tuning(tmp_path, kind):
    """PEFT gives the model labels of its own making, with virtual tokens before them."""

    def trained(config, cls=LeMoSFTTrainer):
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
        return make_trainer(
            tmp_path, config, kind=kind, cls=cls, model=model(False), peft_config=prompt
        )

    stock = logs(trained(None, trl.SFTTrainer))
    assert_same_logs(logs(trained(FULL)), stock)
    for half, log in zip(logs(trained(HALF)), stock, strict=True):
        assert half["loss"] == pytest.approx(log["loss"], rel=0.2)
