"""Dry models that tests of the plan share: each is made once, and keeps the steps that it ran."""

import pytest

from lemo_hf.planning import plan
from lemo_hf.planning.dry_step import DryModel

MOST = 8  # that are kept
_made = {}


@pytest.fixture(autouse=True)
def _poison():
    """None: what has no memory cannot be read, and filling it doubles the time of a dry run."""


@pytest.fixture(autouse=True)
def dry_models_are_shared(monkeypatch):
    """Of equal configs and settings there is one, for all tests of a process."""

    def shared(config, trained, batch):
        key = type(config), config.to_json_string(use_diff=False), repr(trained), batch
        if key not in _made:
            if len(_made) == MOST:
                _made.pop(next(iter(_made)))
            _made[key] = DryModel(config, trained, batch)
        return _made[key]

    monkeypatch.setattr(plan, "DryModel", shared)


@pytest.fixture
def own_dry_models(dry_models_are_shared):
    """A test that changes what a dry run does, or looks into one, takes none of another's."""
    _made.clear()
    yield
    _made.clear()
