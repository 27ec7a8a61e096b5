"""A causal LM that the user compiles: its training passes run uncompiled, all others compiled.

A sparse pass keeps other tokens with every batch, and its kernels are already fused. Dynamo would
trace LeMo's hooks and gradients, and break its graph at most of them.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

# What `torch.nn.Module.__call__` calls, and what `Module.compile` compiles. It is looked up at each
# call, so it does not matter whether the model is compiled before or after.
CALL = "_call_impl"


def stock_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call ``model`` as PyTorch does: its hooks and its forward."""
    return type(model)._call_impl(model, *args, **kwargs)


def train_eagerly(model: nn.Module, train: Callable = stock_call) -> None:
    """From now on ``model`` in training mode runs ``train(model, ...)``, never compiled."""
    compiled = model._compiled_call_impl
    if compiled is not None:  # by ``model.compile()``
        model._compiled_call_impl = partial(_call, compiled, train, model)
    # A method, since accelerate binds those anew to the copy whose layers it compiles one by one.
    vars(model)[CALL] = MethodType(partial(_call, None, train), model)


def compile_all(model: nn.Module) -> None:
    """Undo `train_eagerly`."""
    del vars(model)[CALL]
    compiled = model._compiled_call_impl
    if isinstance(compiled, partial):
        model._compiled_call_impl = compiled.args[0]


def _call(
    compiled: Callable | None, train: Callable, model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    # Compiled since, this may be all that is left of `train_eagerly`.
    if model.training and CALL in vars(model):
        return _eagerly(train, model, *args, **kwargs)
    if compiled is not None:
        return compiled(*args, **kwargs)
    return stock_call(model, *args, **kwargs)


@torch.compiler.disable
def _eagerly(train: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return train(model, *args, **kwargs)
