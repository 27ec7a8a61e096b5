"""The one way to call the attention module of a layer, on kept rows.

The module's own forward runs. If transformers wrote it, ``self`` is a stand-in for the module, with
other projections and another attention function in its config, and one function among its globals
is replaced: the rotary embedding, which nothing else could reach. The module itself changes only
its ``forward``, for the time of the call, so that hooks on its call run.
"""

from inspect import CO_VARKEYWORDS
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from lemo_hf.altered import Altered, altering
from lemo_hf.core import whole_heads
from lemo_hf.core.lora import has_adapter, linear_of
from lemo_hf.kernels.launch import runs_own_forward
from lemo_hf.kernels.rotary import KeptRotary, rotary
from lemo_hf.parallel.sequence_attention import shared_config
from lemo_hf.parallel.sequence_parallel import Share

_ROTARY = "apply_rotary_pos_emb"


def call_attention(
    attention: nn.Module,
    positions: tuple[KeptRotary, KeptRotary] | None,
    share: Share | None = None,
    unread: str | None = None,
    halves: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Output of the attention module for kept rows.

    Args:
        attention: Attention module of the layer.
        positions: Rotary cos and sin at the kept positions, or None.
        share: Division of the rows among processes; None if this process works on all.
        unread: Name of a projection whose result nobody reads.
        halves: Whether rotary positions, if the module has any, rotate the two halves of a head.
        **kwargs: Arguments of its layer's forward, without ``position_embeddings``.
    """
    others = {}
    if share is not None:
        others["config"] = shared_config(attention.config, share)
    elif whole_heads.are_needed(attention, kwargs["hidden_states"].device):
        others["config"] = whole_heads.repeating_config(attention.config)
    forward = type(attention).forward
    code: Any = getattr(forward, "__code__", None)
    known = "forward" not in vars(attention) and runs_own_forward(attention)
    names = forward.__globals__ if known else {}
    if positions is not None:
        if known and halves and _ROTARY in code.co_names and _is_known(names[_ROTARY]):
            names = {**names, _ROTARY: rotary}
            kwargs["position_embeddings"] = positions
        else:
            kwargs["position_embeddings"] = tuple(part.gathered for part in positions)
    if known:
        own = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
        stand_in = Altered(attention, {**_linears(attention, unread), **others})
        others = {"forward": MethodType(own, stand_in)}
        if not code.co_flags & CO_VARKEYWORDS:
            taken = code.co_varnames[: code.co_argcount]
            kwargs = {name: value for name, value in kwargs.items() if name in taken}
    # Else the forward is somebody else's, who may read the module itself.
    with altering(attention, **others):
        return attention(**kwargs)[0]


def _is_known(function: Any) -> bool:
    """Whether a rotary embedding is transformers' or Liger's, which compute the same."""
    return getattr(function, "__module__", "").startswith(("transformers.", "liger_kernel."))


def _linears(attention: nn.Module, unread: str | None) -> dict[str, Any]:
    """Functions to call in place of projections."""
    found = {}
    for name, module in attention.named_children():
        linear = linear_of(module, values=name != unread or not has_adapter(module))
        if linear is not module:
            found[name] = linear
    return found
