"""The class of a sparse layer, and the class that the layer has without LeMo."""

from functools import cache
from inspect import unwrap
from typing import Any


@cache
def sparse_class(mixin: type, base: type) -> type:
    """The subclass of a decoder layer's class with ``mixin`` before it, under the same name."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), names)


@cache
def stock_class(mixin: type, kind: type) -> type:
    """The class that ``kind`` would be without `sparse_class`, also if another class was derived
    from that one since (FSDP2's, a user's).

    A class that calls ``super()`` in a method stays what it is, since the method would refuse a
    layer of any other class. Without LeMo's data ``mixin`` does nothing there.
    """
    if not issubclass(kind, mixin):
        return kind
    if kind.__bases__[0] is mixin:
        return kind.__bases__[1]
    own = {name: x for name, x in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    # transformers wraps the forward of each class that is derived, here LeMo's.
    if "forward" in own and unwrap(own["forward"]) is vars(mixin)["forward"]:
        del own["forward"]
    if any(map(_calls_super, own.values())):
        return kind
    make: Any = type(kind)
    return make(kind.__name__, tuple(stock_class(mixin, x) for x in kind.__bases__), own)


def _calls_super(value: Any) -> bool:
    """Whether a method, property or class method knows the class that it is defined in."""
    parts = [value, *(getattr(value, name, None) for name in ("fget", "fset", "__func__"))]
    codes = [unwrap(part).__code__ for part in parts if hasattr(part, "__code__")]
    return any("__class__" in code.co_freevars for code in codes)
