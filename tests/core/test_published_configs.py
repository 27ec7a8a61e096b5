"""Each family with the settings that are published for it, of which tiny configs hide some."""

import pytest
import torch
import transformers
from support.models import LINEAR, MAMBA, loss_and_gradients, relative_error
from support.published_configs import PUBLISHED
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core.families import FAMILIES

# All that is smaller than it is published. Heads are wider together than the stream, as Qwen3's.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
}
CONVOLUTIONS = ["conv", "full_attention"] * 2
LATENT = {"head_dim": 64, "num_key_value_heads": 4}
# What a config class leaves open, and heads that cannot be wider together than the stream.
OPEN = {
    "ministral": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "helium": {"head_dim": 8},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2},
    "youtu": LATENT,
    "deepseek_v3": {**LATENT, "n_group": 2, "topk_group": 1},
    "glm4_moe_lite": LATENT,
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 6,
    },
    "qwen3_next": {"layer_types": LINEAR},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "olmo_hybrid": {"layer_types": LINEAR},
    "lfm2": {"layer_types": CONVOLUTIONS},
    "lfm2_moe": {"layer_types": CONVOLUTIONS, "num_dense_layers": 1},
    "granitemoehybrid": {**MAMBA, "layer_types": LINEAR, "shared_intermediate_size": 24},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def published_model(family, published):
    """A tiny model of the published settings; what they do not name, the config class does."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    kind = CONFIG_MAPPING[family]
    whole = kind(**published)
    whole.allow_global_per_layer_attribute_access = True  # of those whose layers differ in heads
    own = property  # which a config computes from others, as Falcon its head_dim
    small = {
        name: value
        for name, value in SMALL.items()
        if getattr(whole, name, None) is not None and not isinstance(vars(kind).get(name), own)
    }
    config = kind(**{**published, **small, **OPEN.get(family, {}), **SPECIAL})
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


CASES = [(family, "its config class", {}) for family in FAMILIES] + PUBLISHED


@pytest.mark.parametrize(("family", "checkpoint", "published"), CASES)
def test_retention_1_is_the_stock_model(family, checkpoint, published):
    """Dropout as published too: it draws the same numbers, since it stands at the same places."""
    model = published_model(family, published)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for lemo in (False, True):
        if lemo:
            apply_lemo(model, LeMoConfig(retention=1.0, block_size=16))
        torch.manual_seed(0)
        found.append(loss_and_gradients(model, input_ids=ids, labels=ids))
    remove_lemo(model)
    (loss, gradients), (sparse_loss, sparse) = found
    assert sparse_loss == pytest.approx(loss, rel=1e-6)
    most = max(gradient.norm() for gradient in gradients.values())
    assert sparse.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient.norm() > 1e-6 * most:
            assert relative_error(sparse[name], gradient) < 1e-4, name
