"""What the tests of the plan share."""

from support.allocations import launched

__all__ = ["launched"]
