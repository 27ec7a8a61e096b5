"""An object with other attributes: in a stand-in for it, or in itself for a while.

docs/patched-internals.md lists what is patched.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Altered:
    """Stand-in for ``original`` with other ``attributes``; the original does not change.

    Args:
        original: Any object. Attributes that are set later are set on it.
        attributes: Values of the other attributes, by name.
    """

    def __init__(self, original: Any, attributes: Mapping[str, Any]):
        self.__dict__.update(attributes, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)


@contextmanager
def altering(owner: Any, **attributes: Any) -> Iterator[None]:
    """Within this context ``owner`` itself has these attributes."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)
