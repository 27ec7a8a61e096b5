"""Mistakes of a user, gathered so that one message reports all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Mistakes:
    """Gathers errors; as a context manager it raises them at its end.

    A single error is raised unchanged; several are raised as a ValueError with a line for each.
    """

    def __init__(self) -> None:
        self.found: list[Exception] = []

    def add(self, text: str) -> None:
        """Add a mistake, given in words."""
        self.found.append(ValueError(text))

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within this context a user's mistake does not raise: it is added, and the work goes on
        behind the context."""
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
    """Several mistakes in one error."""

    def __init__(self, each: list[Exception]):
        self.each = each
        super().__init__("\n".join([f"{len(each)} mistakes:", *(f"- {x}" for x in each)]))
