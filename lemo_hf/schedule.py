"""Which steps of a run are its last ones."""


def last_steps(share: float, steps: int) -> int:
    """Number of the last optimizer steps that are ``share`` of ``steps``: at least one, or 0 if
    ``share`` is 0."""
    return max(1, round(share * steps)) if share else 0


def is_late(share: float, step: int, steps: int | None) -> bool:
    """Whether the step after ``step`` of ``steps`` is one of those; no if ``steps`` is unknown."""
    if not steps:
        return False
    return share > 0 and step >= steps - last_steps(share, steps)
