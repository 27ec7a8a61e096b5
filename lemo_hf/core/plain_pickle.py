"""A model with LeMo on it is pickled as the plain model, which loads without lemo-hf.

`copy.deepcopy` uses the methods of `pickle`. A copy keeps LeMo.
"""

import copy
import copyreg
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def pickled_as(kind: type, module: nn.Module, own: Iterable[str]) -> tuple[Callable, tuple, dict]:
    """Result of ``__reduce_ex__`` that makes ``module`` a ``kind`` without attributes ``own``."""
    state = {name: value for name, value in module.__getstate__().items() if name not in own}
    # Not `copyreg.__newobj__`, for which pickle insists on the class of ``module``.
    return copyreg._reconstructor, (kind, object, None), state  # type: ignore[attr-defined]


def deep_copy(module: _Module, memo: dict[int, Any]) -> _Module:
    """Copy of a module that `copy.deepcopy` makes if its class defines nothing for pickles."""
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    twin.__setstate__(copy.deepcopy(module.__getstate__(), memo))
    return twin


def pickle_plain(model: nn.Module, own: Iterable[str]) -> None:
    """From now on ``model`` is pickled without attributes ``own`` and without hooks of lemo-hf."""
    # Its class stays as it is. A method, for the same reason as in `compiled`. No __deepcopy__:
    # PEFT's and torch.compile's wrappers would answer with it for themselves.
    vars(model)["__reduce_ex__"] = MethodType(partial(_reduce, own), model)


def pickle_whole(model: nn.Module) -> None:
    """Undo `pickle_plain`."""
    del vars(model)["__reduce_ex__"]


class _State(dict):
    """State of a model as `pickle` gets it; `copy.deepcopy` copies the whole state."""

    def __init__(self, plain: dict[str, Any], whole: dict[str, Any]):
        super().__init__(plain)
        self.whole = whole

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.whole, memo)


def _reduce(own: Iterable[str], model: nn.Module, protocol: int) -> tuple[Callable, tuple, dict]:
    names = {*own, "__reduce_ex__"}
    make, args, state = pickled_as(type(model), model, names)
    ours = {i for name in _HOOKS for i, hook in state[name].items() if _is_ours(hook)}
    for name, table in state.items():
        if name.startswith(_HOOKS):  # what says how hooks are called, too
            state[name] = type(table)((i, x) for i, x in table.items() if i not in ours)
    return make, args, _State(state, model.__getstate__())


def _is_ours(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", None))
    return owner.__module__.startswith("lemo_hf.")
