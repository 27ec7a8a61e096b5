"""PEFT's methods by the real library: at retention 1 the stock stack, at 0.5 trained and sparse."""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoftQConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from support.grids import covering
from support.models import batch, loss_and_gradients, make_model, relative_error
from support.trainers import assert_same_weights, dataset, losses, make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo, remove_lemo

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **options})


METHODS = {
    "lora": lora(),
    "lora-bias": lora(bias="lora_only"),
    "lora-all-linear": lora(target_modules="all-linear"),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "olora": lora(init_lora_weights="olora"),
    "pissa": lora(init_lora_weights="pissa"),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "embeddings-and-head-saved": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "norms-saved": lora(modules_to_save=["input_layernorm", "norm"]),
    "trained-tokens": lora(trainable_token_indices=[5, 9, 20]),
    "some-layers": lora(layers_to_transform=[1, 3]),
    "rank-pattern": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "prompt-tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
}


def adapted(config, model=None, **options):
    """A PEFT model whose adapters are not the zeros they begin with."""
    model = get_peft_model(model or make_model("llama"), copy.deepcopy(config), **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name or "vera_lambda_b" in name:
                parameter.normal_(0, 0.1)
    return model.train()


def assert_stock_at_retention_1(model, rel=1e-5, recompute=None):
    """Loss and gradients of the model as it is, and under LeMo that leaves nothing out."""
    loss, gradients = loss_and_gradients(model, **batch())
    apply_lemo(
        model, LeMoConfig(retention=1.0, block_size=16, segment_size=29, recompute=recompute)
    )
    found, sparse = loss_and_gradients(model, **batch())
    assert found == pytest.approx(loss, rel=rel)
    assert sparse.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(sparse[name], gradient) < 10 * rel, name
    remove_lemo(model)


def improves(model, steps=6, rate=2e-2, **config):
    """Trains on one batch with half of the tokens; the losses."""
    lemo = apply_lemo(model, LeMoConfig(retention=0.5, block_size=8, policy="random", **config))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=rate), []
    for _ in range(steps):
        loss = model(**batch(tokens=64)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert 0.5 <= lemo.report()["attention_retention"] < 0.55  # prompts may begin with tokens
    assert all(map(torch.isfinite, torch.tensor(losses))) and losses[-1] < losses[0]
    return losses


@pytest.mark.oldest
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_retention_1_is_the_stock_stack(method, recompute):
    assert_stock_at_retention_1(adapted(METHODS[method]), recompute=recompute)


@pytest.mark.parametrize("method", METHODS)
def test_half_of_the_tokens_train(method):
    improves(adapted(METHODS[method]))


def test_full_fine_tuning():
    assert_stock_at_retention_1(make_model("llama"))
    improves(make_model("llama"), rate=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "embeddings", "vera"])
def test_merged_adapters_are_the_model_that_was_trained(method):
    model = adapted(METHODS[method])
    improves(model)
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
    remove_lemo(merged)
    assert_stock_at_retention_1(merged.train().requires_grad_(True))


def test_several_adapters_and_the_switch_between_them():
    model = adapted(METHODS["lora"])
    model.add_adapter("other", lora(r=2, use_dora=True))
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        assert_stock_at_retention_1(model)
    with model.disable_adapter():
        apply_lemo(model, LeMoConfig(retention=1.0, block_size=16))
        plain = make_model("llama")(**batch()).loss
        assert model(**batch()).loss.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.oldest
def test_adapters_and_what_is_saved_with_them_load_by_peft(tmp_path):
    model = adapted(METHODS["embeddings-and-head-saved"])
    improves(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_mixed_precision_of_fp32_weights(autocast):
    """As Trainer's fp16 and bf16 run: autocast, and fp32 adapters."""
    model = adapted(METHODS["lora"], make_model("llama", "sdpa"))
    with torch.autocast("cpu", autocast):
        loss, gradients = loss_and_gradients(model, **batch())
        apply_lemo(model, LeMoConfig(retention=1.0, block_size=16))
        found, sparse = loss_and_gradients(model, **batch())
    assert found == pytest.approx(loss, rel=2e-2)
    for name, gradient in gradients.items():
        assert sparse[name].dtype == torch.float32
        assert relative_error(sparse[name], gradient) < 5e-2, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_low_precision_weights(dtype, autocast_adapter_dtype):
    """Adapters in full precision, PEFT's default, or in that of the weights."""
    own = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = adapted(METHODS["lora"], make_model("llama", "sdpa").to(dtype), **own)
    assert_stock_at_retention_1(model, rel=2e-2)


@pytest.mark.oldest
def test_adapters_put_on_by_transformers_itself():
    model = make_model("llama")
    model.add_adapter(lora())
    assert_stock_at_retention_1(model)
    improves(model)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(r=4, target_modules=LINEARS, total_step=10, task_type="CAUSAL_LM"),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
        AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    ],
)
def test_methods_whose_passes_would_be_dense_are_refused(config):
    with pytest.raises(ValueError, match=rf"PEFT's {config.peft_type.value} is not supported"):
        apply_lemo(adapted(config), LeMoConfig(block_size=8))


def test_adapters_of_a_part_of_the_row_are_refused():
    """PEFT counts from the end of the whole row where they begin."""
    config = lora(alora_invocation_tokens=[3, 4])
    with pytest.raises(ValueError, match=r"alora_invocation_tokens=\[3, 4\] is not supported"):
        apply_lemo(adapted(config), LeMoConfig(block_size=8))


QUANTIZED = {
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4-bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model large enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


def loaded(checkpoint, quantization, dtype, device="cpu"):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=quantization,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map=device,
    )


@pytest.mark.parametrize("recompute", ["none", None])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_qlora(checkpoint, kind, method, recompute):
    """bitsandbytes' own CPU backend; ``None`` follows the checkpointing that PEFT turns on."""
    pytest.importorskip("bitsandbytes")
    if kind == "int8" and method == "dora":
        pytest.skip("bitsandbytes 0.50 has no second step of it on the CPU, without LeMo either")
    dtype = torch.bfloat16 if kind == "fp4-bf16" else torch.float32
    model = loaded(checkpoint, BitsAndBytesConfig(**QUANTIZED[kind]), dtype)
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=recompute is None,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    model = adapted(METHODS[method], model)
    names = {type(module).__name__ for module in model.modules()}
    assert names & {"Linear4bit", "Linear8bitLt"}
    assert_stock_at_retention_1(model, 1e-5 if dtype is torch.float32 else 2e-2, recompute)
    improves(model, recompute=recompute)


def test_torchao_weights(checkpoint):
    torchao = pytest.importorskip("torchao.quantization")
    quantization = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = adapted(METHODS["lora"], loaded(checkpoint, quantization, torch.bfloat16))
    assert "TorchaoLoraLinear" in {type(module).__name__ for module in model.modules()}
    assert_stock_at_retention_1(model, rel=2e-2)
    improves(model)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", QUANTIZED)
def test_qlora_on_the_gpu(checkpoint, kind):
    pytest.importorskip("bitsandbytes")
    values = {**QUANTIZED[kind]}
    if values.get("load_in_4bit"):
        values["bnb_4bit_compute_dtype"] = torch.bfloat16
    model = loaded(checkpoint, BitsAndBytesConfig(**values), torch.bfloat16, {"": 0})
    model = adapted(METHODS["lora"], prepare_model_for_kbit_training(model))
    on_gpu = {name: tensor.cuda() for name, tensor in batch().items()}
    with torch.autocast("cuda", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, **on_gpu)
        apply_lemo(model, LeMoConfig(retention=1.0, block_size=16))
        found, sparse = loss_and_gradients(model, **on_gpu)
    assert found == pytest.approx(loss, rel=2e-2)
    for name, gradient in gradients.items():
        assert relative_error(sparse[name], gradient) < 0.1, name


@pytest.mark.gpu
def test_loftq():
    """PEFT computes its start on a GPU only, by scipy and bitsandbytes."""
    pytest.importorskip("scipy")
    pytest.importorskip("bitsandbytes")
    config = lora(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))
    wide = make_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    assert_stock_at_retention_1(get_peft_model(wide, config).train())


def own_loss(outputs, labels, num_items_in_batch=None):
    """Cross-entropy of the last positions, which are those of the labels; as of Trainer's users."""
    logits = outputs.logits[:, -labels.shape[1] :]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    asked.append((labels[:, 1:] != -100).sum(1).tolist())
    return loss / num_items_in_batch


asked = []


class OwnLoss:
    """Overrides `compute_loss`, in place of a ``compute_loss_func``."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return own_loss(model(**inputs), labels, num_items_in_batch)


@pytest.mark.parametrize(
    ("overridden", "method", "answers"),
    covering((False, True), ("prompt-tuning", "lora"), (None, 20)),
)
def test_a_loss_outside_of_a_model_with_a_prompt(tmp_path, method, answers, overridden):
    """Virtual tokens stand before those that the labels are of."""

    def trained(config, cls=LeMoTrainer):
        asked.clear()
        trainer = make_trainer(
            tmp_path,
            config,
            cls=cls,
            model=adapted(METHODS[method]),
            compute_loss_func=None if overridden else own_loss,
            data=dataset(answers=answers),
        )
        if overridden:
            trainer.__class__ = type("Own", (OwnLoss, cls), {})
        return losses(trainer), trainer

    stock, plain = trained(None, Trainer)
    full, ours = trained(LeMoConfig(retention=1.0, block_size=8))
    assert full == pytest.approx(stock, rel=1e-5)
    assert_same_weights(ours, plain, rtol=1e-3, atol=1e-5)
    half, trainer = trained(LeMoConfig(retention=0.5, block_size=8, policy="random"))
    assert all(0 < loss < 20 for loss in half)
    assert trainer.state.log_history[0]["lemo/attention_retention"] < 0.6
    if answers is None:  # about half of the tokens are asked to predict
        assert all(24 <= count <= 40 for row in asked for count in row)
    else:  # every answer is
        assert {count for row in asked for count in row} == {20}
