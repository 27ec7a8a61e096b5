"""The base model extended to longer rows by YaRN, with LoRA that starts anew for each job."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers import AutoModelForCausalLM as CausalLM
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from benchmarks.s2_attention import s2_attention_forward
from lemo_hf.patch import transformers_model

RANK, ALPHA = 16, 32
S2 = "s2attn_any_heads"


def load_model(base: Path, tokens: int, device: torch.device) -> PeftModel:
    """The base for rows of ``tokens``: bf16 on a GPU, its adapter fp32."""
    config = AutoConfig.from_pretrained(base)
    context = config.max_position_embeddings
    if tokens > context:
        config.rope_parameters = {
            **config.rope_parameters,
            "rope_type": "yarn",
            "factor": tokens / context,
            "original_max_position_embeddings": context,
        }
        config.max_position_embeddings = tokens
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = CausalLM.from_pretrained(base, config=config, dtype=dtype, attn_implementation="sdpa")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).to(device)


def reset_adapter(model: PeftModel, seed: int) -> None:
    """LoRA as it is before training."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", True)


def precision(device: torch.device) -> AbstractContextManager:
    """What training and evaluation run under."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _s2(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    """S2-Attn for a number of heads that the key heads do not halve: each head has its own key."""
    groups = getattr(module, "num_key_value_groups", 1)
    alone = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    key, value = (repeat_kv(x, groups) for x in (key, value))
    return s2_attention_forward(alone, query, key, value, mask, **kwargs)


@contextmanager
def s2_attention(model: PeftModel) -> Iterator[None]:
    """LongLoRA's attention, arXiv:2309.12307; full attention afterwards."""
    AttentionInterface.register(S2, _s2)
    AttentionMaskInterface.register(S2, sdpa_mask)
    inner = transformers_model(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(S2)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
