"""What `bench_step.py` measures: models, providers, and one optimizer step."""

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from record import measure
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.patch import LeMo

COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SHAPES = {
    "Llama-3 8B": {
        **COMMON,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "Llama-2 7B": {
        **COMMON,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
PROVIDERS = [
    provider + checkpointing
    for provider in ("hf", "lemo-0.5", "lemo-0.3")
    for checkpointing in ("", "+checkpointing")
]
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def build_model(shape: dict, longest: int, device: torch.device) -> nn.Module:
    """A PEFT model in training mode with random bf16 weights, made on ``device``.

    Args:
        shape: Arguments of `LlamaConfig`.
        longest: Tokens of the longest sequence.
        device: Where it lives.
    """
    config = LlamaConfig(
        **shape,
        max_position_embeddings=longest,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1) if weight.dim() == 1 else weight.normal_(0, 0.02)
    # Buffers have lost their values. The RoPE frequencies are all there is; they stay fp32.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for name, buffer in model.named_buffers():
        if "rotary_emb" not in name or not buffer.isfinite().all():
            raise RuntimeError(f"the buffer {name} has no values")
    lora = LoraConfig(**LORA, task_type="CAUSAL_LM")
    # bf16 like the rest: peft's fp32 default would cast and keep every projection's input.
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def adapter_weights(model: nn.Module) -> list[nn.Parameter]:
    """What is trained."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def parse_provider(name: str) -> tuple[float | None, bool]:
    """LeMo's retention (None: Hugging Face alone), and whether activations are checkpointed."""
    base, plus, suffix = name.partition("+")
    if plus + suffix not in ("", "+checkpointing") or not base.startswith(("hf", "lemo-")):
        raise ValueError(f"a provider is hf or lemo-RETENTION, then +checkpointing; got {name!r}")
    return (None if base == "hf" else float(base.removeprefix("lemo-"))), bool(plus)


def lemo_config(provider: str, options: dict) -> LeMoConfig | None:
    """What ``provider`` leaves out, by its name and the options; None for Hugging Face alone."""
    retention, _ = parse_provider(provider)
    return None if retention is None else LeMoConfig(**{**options, "retention": retention})


@contextmanager
def provider_on(model: nn.Module, provider: str, options: dict) -> Iterator[LeMo | None]:
    """Put ``provider`` on the model, and take it off again."""
    config, base = lemo_config(provider, options), model.get_base_model()
    try:
        if parse_provider(provider)[1]:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        yield None if config is None else apply_lemo(model, config)
    finally:
        remove_lemo(model)
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()  # hooks that enabling adds and disabling leaves


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: int) -> Tensor:
    """One optimizer step on fresh random tokens, labels the same; the loss, detached."""
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def take_turn(
    step: Callable[[], Tensor], lemo: LeMo | None, device: torch.device
) -> dict[str, float] | str:
    """One step that is not timed (kernels compile, the allocator's cache fills), one that is.

    Returns:
        What `measure` says, or ``"oom"``, or ``"failed: ..."``.
    """
    try:
        step()
        sample = measure(step, device)
    except Exception as error:  # one provider's failure must not cost the others' numbers
        text = str(error)
        if any(sign in text for sign in ("out of memory", "ALLOC_FAILED")):
            return "oom"
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {text[:200]}"
    if lemo is not None and not lemo.report():
        return "failed: no sparse pass took place"
    finite = abs(sample["loss"]) < float("inf")
    return sample if finite else f"failed: the loss is {sample['loss']}"


def empty_memory(optimizer: torch.optim.Optimizer) -> None:
    """Drop gradients, and what the allocator has cached."""
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()


def print_kernels(step: Callable[[], Tensor], count: int = 15) -> None:
    """The CUDA kernels that take most of a step: ms, calls, name."""
    kinds, cuda = torch.profiler.ProfilerActivity, torch.cuda.is_available()
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as profile:
        step()
        if cuda:
            torch.cuda.synchronize()
    events = [
        event
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    events.sort(key=lambda event: event.self_device_time_total, reverse=True)
    print(f"{sum(event.self_device_time_total for event in events) / 1e3:.1f} ms in kernels:")
    for event in events[:count]:
        print(f"{event.self_device_time_total / 1e3:9.1f} ms {event.count:6d} x {event.key[:70]}")
