"""A base model in bitsandbytes' 4 or 8 bits, with random weights."""

from dataclasses import dataclass

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import replace_with_bnb_linear

BITS = {"nf4": 4, "int8": 8}


@dataclass(frozen=True)
class Base:
    """How the weights are held.

    Attributes:
        kind: A key of `BITS`; None: in bf16.
        kbit_training: PEFT has prepared the quantised model: embeddings, head and norms are fp32,
            adapters too, and steps run under autocast. Otherwise they are bf16.
        wide: Adapters as Unsloth publishes its lengths with: `model_shapes.WIDE`, not `LORA`.
    """

    kind: str | None = None
    kbit_training: bool = False
    wide: bool = False

    @property
    def name(self) -> str:
        """In the header and in the file's name; empty for bf16."""
        parts = [self.kind, "kbit-training" * self.kbit_training, "wide" * self.wide]
        return "-".join(filter(None, parts))

    @property
    def plan_settings(self) -> dict:
        """What `lemo_hf.planning.plan.plan` needs to know of it."""
        return {
            # PEFT leaves those of 8-bit linears fp32 whatever it is told.
            "adapter_dtype": "float32" if self.kbit_training or self.kind == "int8" else "bfloat16",
            "autocast": self.kbit_training,
            "load_in_4bit": self.kind == "nf4",
            "load_in_8bit": self.kind == "int8",
            "kbit_training": self.kbit_training,
        }


def quantize(model: nn.Module, base: Base, device: torch.device) -> nn.Module:
    """Give a model on the meta device random weights, its linears' quantised one after the other.

    No more than one of them exists in 16 bits at a time.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=base.kind == "nf4",
        load_in_8bit=base.kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = replace_with_bnb_linear(model, ["lm_head"], settings)
    quantized = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
    for module in quantized:
        old = module.weight
        weight = torch.empty(
            module.out_features, module.in_features, dtype=torch.bfloat16, device=device
        ).normal_(0, 0.02)
        # LLM.int8 quantises what comes from the CPU.
        weight = weight.cpu() if base.kind == "int8" else weight
        own = {k: v for k, v in vars(old).items() if k not in ("data", "requires_grad")}
        module.weight = type(old)(weight, requires_grad=False, **own).to(device)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                made = torch.empty_like(weight, device=device)
                made = made.fill_(1) if weight.dim() == 1 else made.normal_(0, 0.02)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    # What `from_pretrained` leaves, by which PEFT chooses its adapters.
    setattr(model, "is_loaded_in_4bit" if base.kind == "nf4" else "is_loaded_in_8bit", True)
    if base.kbit_training:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model
