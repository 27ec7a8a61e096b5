"""The learned predictors that a `LeMoConfig` names: looked up for the model, and loaded."""

import logging

from lemo_hf.config import LeMoConfig
from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.on_hub import find_predictor
from lemo_hf.predictors.predictor_set import LeMoPredictor

logger = logging.getLogger(__name__)


def load_predictor(config: LeMoConfig, base: BaseModel) -> LeMoPredictor:
    """Load ``config.predictor``.

    Args:
        config: Config whose ``predictor`` is a directory, a repository or ``"auto"``.
        base: Model that is to be trained; ``"auto"`` looks up its name and its weights.

    Raises:
        OSError: There is no such directory or repository, or it cannot be reached.
        ValueError: The Hub has no predictor for the model, or the files are incomplete or damaged.
    """
    source = config.predictor
    assert source is not None
    if source == "auto":
        source = find_predictor(base, config.block_size)
    predictor = LeMoPredictor.from_pretrained(source, revision=config.predictor_revision)
    logger.info("predictors of %s: %s", source, predictor.describe())
    return predictor
