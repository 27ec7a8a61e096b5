"""Predictors that are known for a base model: what ``predictor="auto"`` looks up.

``registry.json`` beside this file maps a base model's name, as it is passed to `from_pretrained`,
to predictors for it: a Hub repository, or a directory. A directory begins with ``./`` and is
relative to the registry. Upper and lower case of the base model's name do not matter::

    {"organisation/base-model": "organisation/its-predictors", "my/model": "./my-predictors"}
"""

import logging
from pathlib import Path

from lemo_hf.files import read_json

logger = logging.getLogger(__name__)

REGISTRY = Path(__file__).with_name("registry.json")


def find_predictor(base_name: str | None) -> str | None:
    """Repository or directory of the predictors registered for a base model, or None.

    Args:
        base_name: ``config._name_or_path`` of the model; None or "" if it was made from scratch.

    Raises:
        ValueError: The registry is no JSON object.
    """
    registered = {name.lower(): found for name, found in read_json(REGISTRY).items()}
    found = registered.get((base_name or "").lower())
    if found is None:
        logger.info("no predictors are registered for %r (%d are)", base_name, len(registered))
        return None
    if found.startswith("./"):
        found = str(REGISTRY.parent / found)
    logger.info("predictors registered for %r: %s", base_name, found)
    return found
