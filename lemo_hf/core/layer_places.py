"""Whether the decoder layers that LeMo is on are those that a pass runs.

A user may put something around a layer, or another layer in its place, after `apply_lemo`.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import cast

from torch import nn

from lemo_hf.core.family import Family
from lemo_hf.memory.out_of_memory import CHECKPOINTING

AGAIN = "Call remove_lemo(model) and then apply_lemo(model, config), which takes layers as they are"


def wrapped_layers(model: nn.Module, family: Family, layers: Sequence[nn.Module]) -> frozenset[int]:
    """Indices of layers around which something stands that may read their input as well.

    Args:
        model: The causal LM that is called; accelerate makes a copy of it to compile its layers.
        family: Names of its parts.
        layers: The layers that LeMo is on.

    Raises:
        RuntimeError: LeMo is not on a layer that would run, the layer would run again outside its
            pass, or the layers are not where they were.
    """
    try:
        places = cast(nn.ModuleList, model.get_submodule(family.layers))
    except AttributeError as error:
        raise RuntimeError(
            f"the decoder layers are not at {family.layers!r} any more, where they were when LeMo "
            f"was put on: {error}. {AGAIN}; or give what stands around them their attributes."
        ) from None
    wrapped = set()
    for index, (place, layer) in enumerate(zip_longest(places, layers)):
        if place is None or layer is None:
            raise _not_ours(index)
        if place is layer or getattr(place, "_orig_mod", None) is layer:  # compiled
            continue
        if layer not in set(place.modules()):
            raise _not_ours(index)
        if hasattr(place, "_checkpoint_wrapped_module"):
            raise RuntimeError(
                f"layer {index} is inside PyTorch's {type(place).__name__}, which stores the whole "
                "stream and runs the layer again outside its pass. Take the wrapper off and set "
                f"TrainingArguments({CHECKPOINTING}=True): LeMo then stores kept rows only."
            )
        wrapped.add(index)
    return frozenset(wrapped)


def check_ran(ran: set[int], layers: Sequence[nn.Module]) -> None:
    """Raises RuntimeError unless each of ``layers`` has run in the sparse pass that has ended.

    Args:
        ran: Indices of those that have.
        layers: The layers that LeMo is on.
    """
    if len(ran) < len(layers):
        raise _not_ours(min(set(range(len(layers))) - ran))


def _not_ours(index: int) -> RuntimeError:
    return RuntimeError(
        f"layer {index} of this training pass is not the one that LeMo was put on, or its forward "
        "was replaced since: it would run dense, or not at all. "
        f"{AGAIN}; or put the layer back."
    )
