"""Predictors on the Hub for a base model, for ``predictor="auto"``.

A predictor's model card has ``base_model`` and the tag ``lemo-predictor``
(`LeMoPredictor.push_to_hub`), by which the Hub finds it. Its ``lemo_config.json`` has the
fingerprint of the weights that it belongs to.
"""

import logging

from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.model_card import TAG
from lemo_hf.predictors.predictor_files import read_section
from lemo_hf.storage.files import CONFIG_NAME, find_files

logger = logging.getLogger(__name__)

MOST = 20  # repositories that are looked into
_WAY_OUT = (
    "Set predictor to a directory or Hub repository, make one with `lemo train-predictor`, or use "
    "policy='overlap', which needs none."
)


def find_predictor(base: BaseModel, block_size: int) -> str:
    """Find the most downloaded repository whose predictors belong to a model's weights.

    Args:
        base: Model that is to be trained.
        block_size: Tokens a block, of its `LeMoConfig`.

    Raises:
        OSError: The Hub cannot be reached.
        ValueError: The model has no name on the Hub, or nothing there fits; the message says why.
    """
    if base.name is None:
        raise ValueError(
            "predictor='auto' asks the Hub by the model's name, which a model from a directory or "
            f"from scratch does not have. {_WAY_OUT}"
        )
    rejected = {}
    for repo in _tagged(base.name):
        why = _misfit(repo, base, block_size)
        if why is None:
            logger.info("predictor='auto' takes %s, made for %s", repo, base.name)
            return repo
        rejected[repo] = why
    found = "; ".join(f"{repo}: {why}" for repo, why in rejected.items())
    raise ValueError(
        f"predictor='auto': the Hub has no predictor for the weights of {base.name!r}"
        f"{f' ({found})' if found else ''}. {_WAY_OUT}"
    )


def _tagged(name: str) -> list[str]:
    """Repositories with predictors for the base model of this name, most downloaded first."""
    from huggingface_hub import HfApi

    try:
        models = HfApi().list_models(
            filter=[TAG, f"base_model:{name}"], sort="downloads", limit=MOST
        )
        return [model.id for model in models]
    except Exception as error:  # httpx and httpx2, of either client version, share no base class
        raise OSError(
            f"predictor='auto' could not ask the Hub ({type(error).__name__}: {error}). {_WAY_OUT}"
        ) from error


def _misfit(repo: str, base: BaseModel, block_size: int) -> str | None:
    """Why the predictors of ``repo`` do not fit, in words, or None."""
    try:
        (path,) = find_files(repo, [CONFIG_NAME])
        section = read_section(path)
        theirs = BaseModel(**section["base"])
        size = section["block_size"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return str(error)
    if not theirs.same_architecture(base):
        return "made for another architecture"
    if base.fingerprint is None:
        logger.warning("%s may be for other weights: those of this model cannot be read here", repo)
    elif theirs.fingerprint != base.fingerprint:
        return "made for other weights"
    if size != block_size:
        return f"made for block_size={size}, not {block_size}"
    return None
