"""What `LeMoDPOTrainer` refuses, and what its passes leave out beside tokens."""

import dataclasses

import pytest
import torch
from support.models import make_model

trl = pytest.importorskip("trl", minversion="1.16")

from peft import PromptTuningConfig, get_peft_model  # noqa: E402
from support.dpo import (  # noqa: E402
    HALF,
    MODELS,
    batch_of,
    logs,
    make_trainer,
    model,
    one_step,
)

from lemo_hf import LeMoConfig  # noqa: E402
from lemo_hf.core import fp8  # noqa: E402
from lemo_hf.kernels import norm_rows  # noqa: E402


def refused(tmp_path, match, config=HALF, **arguments):
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, config, **arguments)


def test_what_does_not_fit_is_refused_with_the_way_out(tmp_path):
    refused(tmp_path, r"truncation_mode='keep_end'.*keep_start", truncation_mode="keep_end")
    refused(tmp_path, r"activation_offloading=True.*offload_gib", activation_offloading=True)
    shared = LeMoConfig(sequence_parallel_size=2)
    refused(tmp_path, r"sequence_parallel_size=2.*Set it to 1", shared)
    early = {"precompute_ref_log_probs": True}
    refused(
        tmp_path, r"policy='pooled'.*precompute_ref_log_probs", LeMoConfig(policy="pooled"), **early
    )
    finish = LeMoConfig(dense_finish=0.1)
    refused(tmp_path, r"dense_finish=0.1.*dense_finish=0", finish, **early)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    refused(tmp_path, r"PROMPT_TUNING.*LoRA", model=model(False), peft_config=prompt)
    deep = make_model("llama", vocab_size=2048, num_hidden_layers=5)
    refused(tmp_path, r"ref_model has 5 layers", model=model(False), ref_model=deep)


def test_experts_auxiliary_loss_is_refused_with_the_way_out(tmp_path):
    def moe():
        return {
            "model": make_model("qwen3_moe", vocab_size=2048),
            "ref_model": make_model("qwen3_moe", vocab_size=2048).eval(),
        }

    refused(tmp_path, r"router_aux_loss_coef=0", **moe())
    assert len(logs(make_trainer(tmp_path, HALF, router_aux_loss_coef=0.0, **moe()))) == 3


def test_pairs_whose_prompts_differ_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, HALF)
    batch = batch_of(trainer)
    batch["input_ids"][4, 3] += 1
    with pytest.raises(ValueError, match=r"row 0 of 8 .* 1 tokens of their prompts differ"):
        one_step(trainer, batch)
    batch = batch_of(trainer)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        batch[name] = torch.nn.functional.pad(batch[name], (5, 0))
    with pytest.raises(ValueError, match=r" 5 tokens .* padding before them.*on the right"):
        one_step(trainer, batch)


@pytest.mark.parametrize("models", ["adapter", "ref_model"])
def test_no_mask_is_made_of_padding_on_the_right(tmp_path, models):
    """It would be T x T for each row, and keep the fastest attention kernels away."""
    trainer = make_trainer(tmp_path, HALF, **MODELS[models]())
    masks = []
    for each in {id(m): m for m in (trainer.model, trainer.ref_model) if m is not None}.values():
        for layer in getattr(each, "get_base_model", lambda m=each: m)().model.layers:
            layer.self_attn.config._attn_implementation = "sdpa"
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
            )
    batch = batch_of(trainer)
    assert not batch["attention_mask"].all()
    one_step(trainer, batch)
    assert masks == [None] * 8


@pytest.mark.parametrize("models", ["adapter", "ref_model"])
def test_the_final_norm_is_taken_of_labelled_rows_alone(tmp_path, models):
    """Of policy and reference: no more rows than the completions have tokens."""
    trainer = make_trainer(tmp_path, HALF, **MODELS[models]())
    batch, seen = batch_of(trainer), []
    read_rows = norm_rows.read_rows

    def counted(x, index, norm):
        seen.append(len(index))
        return read_rows(x, index, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm_rows, "read_rows", counted)
        one_step(trainer, batch)
    assert seen == [int(batch["completion_mask"].sum())] * 2


def test_a_batch_without_completions_has_gradients_of_nothing(tmp_path):
    trainer = make_trainer(tmp_path, HALF)
    batch = {name: x[:, :40] for name, x in batch_of(trainer, 3).items()}  # cut in the prompts
    assert not batch["completion_mask"].any()
    loss, _, gradients = one_step(trainer, batch)
    assert loss == pytest.approx(0.693147, abs=1e-5)
    assert gradients and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("models", ["new-adapter", "ref_model"])
def test_mixed_precision(tmp_path, models):
    """Before the first step the policy is its reference, to the bit."""
    options = MODELS[models]()
    if models == "ref_model":
        options["ref_model"] = model(lora=False).eval()
    found = logs(make_trainer(tmp_path, HALF, bf16=True, **options))
    stock = logs(make_trainer(tmp_path, None, bf16=True, **MODELS["new-adapter"]()))
    assert found[0]["rewards/chosen"] == found[0]["rewards/rejected"] == 0
    assert found[0]["lemo/attention_retention"] < 0.9
    assert found[0]["logps/chosen"] == pytest.approx(stock[0]["logps/chosen"], rel=0.1)
    assert all(0 < log["loss"] < 5 for log in found)


@pytest.mark.parametrize("models", ["new-adapter", "ref_model"])
def test_fp8_rounds_both_alike(tmp_path, monkeypatch, models):
    """Nothing is learned, so policy and reference are the same model: also after FP8 has ended."""
    monkeypatch.setattr(fp8, "FEWEST_ROWS", 8)
    options = MODELS["new-adapter"]()
    if models == "ref_model":  # that nobody has frozen, as TRL leaves it
        options["model"] = get_peft_model(options["model"], options.pop("peft_config"))
        options["ref_model"] = model(lora=False).eval()
    config = dataclasses.replace(HALF, fp8=True, bf16_finish=0.5)
    trainer = make_trainer(tmp_path, config, **options, learning_rate=0.0, max_steps=2)
    for log in logs(trainer):
        assert log["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert log["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_fp8_and_a_reference_that_moves_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fp8=True and sync_ref_model=True"):
        make_trainer(tmp_path, LeMoConfig(fp8=True), sync_ref_model=True)


def test_a_reference_computed_in_fp8_is_that_of_every_step(tmp_path):
    options = {"precompute_ref_log_probs": True}
    with pytest.raises(ValueError, match=r"fp8=True and bf16_finish=0.3.*Set bf16_finish=0"):
        make_trainer(tmp_path, LeMoConfig(fp8=True), **options)
