"""Values from outside in messages: as Python writes them, but short, whatever they are."""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

MOST_LETTERS = 300
_MOST_BITS = 1000  # of an integer that is written out


class _Short(reprlib.Repr):
    """Looks at a bounded part of a value: aliases in YAML can make it larger than any memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxother = 160

    def repr_int(self, x: int, level: int) -> str:
        """Python itself refuses to write integers of many digits."""
        if x.bit_length() > _MOST_BITS:
            return f"<an integer of {x.bit_length()} bits>"
        return super().repr_int(x, level)


def shown(value: Any) -> str:
    """``repr(value)`` in at most `MOST_LETTERS`."""
    return shortened(_Short().repr(value))


def shortened(text: str, most: int = MOST_LETTERS) -> str:
    """``text``, cut to at most ``most`` letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def nearest(name: Any, known: Iterable[Any]) -> str:
    """The end of a sentence that says ``name`` is unknown: a question for the name that may be
    meant, or a full stop."""
    words = [word for word in known if isinstance(word, str)]
    near = get_close_matches(shortened(str(name)), words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."
