"""Mistakes of a user, gathered so that all of them are told at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Mistakes:
    """Gathers errors; as a context it raises what it has at its end.

    One alone is raised as it is; several are a ValueError with a line each.
    """

    def __init__(self) -> None:
        self.found: list[Exception] = []

    def add(self, text: str) -> None:
        """Note a mistake in words."""
        self.found.append(ValueError(text))

    @contextmanager
    def noted(self) -> Iterator[None]:
        """What is raised inside for a user's mistake is noted, and the work goes on after it."""
        try:
            yield
        except Several as error:
            self.found += error.each
        except (ValueError, OSError, ImportError) as error:
            self.found.append(error)

    def __enter__(self) -> "Mistakes":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None or not self.found:
            return
        if len(self.found) == 1:
            raise self.found[0]
        raise Several(self.found)


class Several(ValueError):
    """More than one mistake."""

    def __init__(self, each: list[Exception]):
        self.each = each
        super().__init__("\n".join([f"{len(each)} mistakes:", *(f"- {x}" for x in each)]))
