"""The learned predictors that a `LeMoConfig` names: looked up for the model, and loaded."""

import logging
from typing import Any

from lemo_hf.config import LeMoConfig
from lemo_hf.predictors.predictor_set import LeMoPredictor
from lemo_hf.predictors.registry import find_predictor

logger = logging.getLogger(__name__)


def load_predictor(config: LeMoConfig, model_config: Any) -> LeMoPredictor:
    """Load ``config.predictor``.

    Args:
        config: Its ``predictor`` is a directory, a repository or ``"auto"``.
        model_config: The model's transformers config, whose name ``"auto"`` looks up.

    Raises:
        OSError: There is no such directory or repository, or it cannot be reached.
        ValueError: None is registered for the model, or the files are no whole predictor.
    """
    source = config.predictor
    assert source is not None
    if source == "auto":
        name = getattr(model_config, "_name_or_path", None)
        source = find_predictor(name)
        if source is None:
            raise ValueError(
                f"predictor='auto': no predictor is registered for the base model {name!r}. Set "
                "predictor to a directory or Hub repository, make one with `lemo train-predictor`, "
                "or use policy='pooled', which needs none."
            )
    predictor = LeMoPredictor.from_pretrained(source, revision=config.predictor_revision)
    logger.info("predictors of %s: %s", source, predictor.describe())
    return predictor
