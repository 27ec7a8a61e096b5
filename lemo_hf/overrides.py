"""What users override of a trainer."""

from typing import Any

KNOWN = ("lemo_hf", "transformers", "trl")


def overrides(trainer: Any, method: str) -> bool:
    """Whether a method of ``trainer`` is the user's: of a class of theirs, a function of theirs in
    place of a known class's, or set on the trainer itself."""
    if method in vars(trainer):
        return True
    owners = [base for base in type(trainer).__mro__ if method in vars(base)]
    made_by = [base.__module__ for base in owners]
    made_by += [getattr(vars(base)[method], "__module__", "") for base in owners]
    return any(module.partition(".")[0] not in KNOWN for module in made_by)
