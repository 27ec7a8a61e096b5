"""bitsandbytes' linears without memory, as a base model of a dry run has them.

They are the real modules, whose operators PyTorch knows the results of. What those take inside is
in `lemo_hf.planning.dry_run`. Outliers, of which LLM.int8 computes in 16 bits, are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share a scale of their own


def quantize(model: Any, layers: nn.ModuleList, bits: int, dtype: torch.dtype) -> None:
    """Put quantised linears in place of those of ``layers``, on the meta device.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ValueError(
            f"load_in_{bits}bit is planned with bitsandbytes' own linears: "
            'pip install "lemo-hf[qlora]".'
        ) from None
    new: Any
    for parent in list(layers.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
            if bits == 8:
                new = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False, device="meta")
                data = torch.empty(*shape[::-1], dtype=torch.int8, device="meta")
                new.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(*shape, bias, dtype, quant_type="nf4", device="meta")
                data = torch.empty(
                    -(-shape[0] * shape[1] // 2), 1, dtype=torch.uint8, device="meta"
                )
                new.weight = bnb.nn.Params4bit(
                    data, requires_grad=False, quant_type="nf4", bnb_quantized=True
                )
            if bias:
                new.bias = linear.bias
            setattr(parent, name, new.requires_grad_(False))
    setattr(model, f"is_loaded_in_{bits}bit", True)


def check_experts(layers: nn.ModuleList) -> None:
    """Raise a ValueError if layers have experts, whose product takes no fp32 weights.

    They are one weight of three dimensions, which bitsandbytes leaves as it is, and PEFT's
    preparation makes fp32.
    """
    if any(weight.dim() == 3 for weight in layers.parameters()):
        raise ValueError(
            "kbit_training=True of experts is not predicted: bitsandbytes leaves their weights, "
            "PEFT's preparation makes them fp32, and PyTorch's grouped product takes bf16 alone. "
            "Plan and train without it: kbit_training=False (--no-kbit-training)."
        )


def quantized_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Give the quantised linears of ``model`` their scales; bytes of these and of the weights."""
    import bitsandbytes as bnb

    size = 0
    for module in model.modules():
        shape = torch.Size((getattr(module, "out_features", 0), getattr(module, "in_features", 0)))
        if isinstance(module, bnb.nn.Linear8bitLt):
            scales = torch.empty(shape[0])
            module.state.CB, module.state.SCB = module.weight, scales
            vars(module.weight).update(CB=None, SCB=None)
            parts = [module.weight, scales]
        elif isinstance(module, bnb.nn.Linear4bit):
            count = -(-shape.numel() // BLOCK)
            again = torch.empty(-(-count // SCALES)), torch.empty(256)
            made = torch.empty(count, dtype=torch.uint8), torch.empty(16), torch.empty(())
            kind = {"blocksize": BLOCK, "dtype": dtype, "quant_type": "nf4"}
            nested = bnb.functional.QuantState(
                again[0], code=again[1], blocksize=SCALES, dtype=torch.float32
            )
            state = bnb.functional.QuantState(
                made[0], shape, code=made[1], offset=made[2], state2=nested, **kind
            )
            vars(module.weight)["quant_state"] = state
            parts = [module.weight, *made, *again]
        else:
            continue
        size += sum(x.nbytes for x in parts)
    return size


@contextmanager
def gpu_autocast(enabled: bool) -> Iterator[None]:
    """PEFT's quantised linears ask about the GPU's autocast alone."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def inside(name: str, args: tuple[Any, ...], out: Any) -> int:
    """Bytes that an operator of bitsandbytes takes beside what it returns."""
    if name == "bitsandbytes::gemm_4bit":  # the weight, and its scales
        count = torch.Size(args[2]).numel()
        return count * args[0].element_size() + 4 * -(-count // BLOCK)
    if name == "bitsandbytes::int8_scaled_mm" and isinstance(out, Tensor):
        return out.numel() * (4 + 2)  # the int32 product, and that in fp16
    return 0
