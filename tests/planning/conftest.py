"""What the tests of the plan share."""

from support.allocations import alike, launched
from support.dry_models import _poison, dry_models_are_shared, own_dry_models

__all__ = ["_poison", "alike", "dry_models_are_shared", "launched", "own_dry_models"]
