"""A model with LeMo on it is pickled as the plain model, which loads without lemo-hf.

`copy.deepcopy` uses the methods of `pickle`. A copy keeps LeMo.
"""

import copy
import copyreg
from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def plain_or_whole(kind: type, module: nn.Module, own: Iterable[str], model: nn.Module) -> tuple:
    """Result of ``__reduce_ex__`` of ``module``, for `pickle` and `copy.deepcopy`.

    Args:
        kind: Class of what `pickle` makes.
        module: Module that is pickled or copied.
        own: Names of attributes that a pickle lacks. A deep copy has them, and the module's class,
            if it is one of the model.
        model: The causal LM that LeMo is on.
    """
    state = {name: value for name, value in module.__getstate__().items() if name not in own}
    # Not `copyreg.__newobj__`, for which pickle insists on the class of ``module``.
    return copyreg._reconstructor, (kind, object, None), _State(state, module, model)  # type: ignore[attr-defined]


def pickle_plain(model: nn.Module, own: Iterable[str]) -> None:
    """From now on ``model`` is pickled without attributes ``own`` and without hooks of lemo-hf."""
    # Its class stays as it is. A method, for the same reason as in `compiled`. No __deepcopy__:
    # PEFT's and torch.compile's wrappers would answer with it for themselves.
    vars(model)["__reduce_ex__"] = MethodType(partial(_reduce, own), model)


def pickle_whole(model: nn.Module) -> None:
    """Undo `pickle_plain`."""
    del vars(model)["__reduce_ex__"]


class _State(dict):
    """State of a module as `pickle` gets it. If `copy.deepcopy` copies the model, it copies the
    whole state."""

    def __init__(self, plain: dict[str, Any], module: nn.Module, model: nn.Module):
        super().__init__(plain)
        self.module, self.model = module, model

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        if id(self.model) not in memo:  # which LeMo's data refer to: all of it would be copied
            return copy.deepcopy(dict(self), memo)
        # `copy` has made the twin, of the plain class, before it copies the state. A module's own
        # `__deepcopy__` could do the same, but torch.compile's wrapper would answer with it.
        twin = memo[id(self.module)]
        twin.__class__ = type(self.module)
        return copy.deepcopy(self.module.__getstate__(), memo)


def _reduce(own: Iterable[str], model: nn.Module, protocol: int) -> tuple:
    make, args, state = plain_or_whole(type(model), model, {*own, "__reduce_ex__"}, model)
    ours = {i for name in _HOOKS for i, hook in state[name].items() if _is_ours(hook)}
    for name, table in state.items():
        if name.startswith(_HOOKS):  # what says how hooks are called, too
            state[name] = type(table)((i, x) for i, x in table.items() if i not in ours)
    return make, args, state


def _is_ours(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", None))
    return owner.__module__.startswith("lemo_hf.")
