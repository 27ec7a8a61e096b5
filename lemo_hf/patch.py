"""`apply_lemo` and `remove_lemo`: make the layers of a model sparse, and restore them.

Nothing of the model is copied or renamed: decoder layers become instances of subclasses of their
classes, and two hooks on the causal LM tell them about each batch and compute the loss. Passes are
sparse in training mode without a KV cache; in every other case the stock code runs.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lemo_hf.check import check
from lemo_hf.config import LeMoConfig
from lemo_hf.core.compiled import CALL, compile_all, stock_call, train_eagerly
from lemo_hf.core.inner_model import transformers_model
from lemo_hf.core.layer import make_stock
from lemo_hf.core.plain_pickle import pickle_plain, pickle_whole
from lemo_hf.describe import brief
from lemo_hf.graphs.cuda_graphs import CudaGraphs
from lemo_hf.lemo import LeMo
from lemo_hf.memory.forks import spare_forks
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.predictors.predictor_set import LeMoPredictor

logger = logging.getLogger(__name__)

_LEMO = "_lemo"


def apply_lemo(
    model: nn.Module,
    config: LeMoConfig,
    predictors: LeMoPredictor | Sequence[BlockPredictor | None] | None = None,
) -> LeMo:
    """Make the training passes of ``model`` sparse.

    Args:
        model: Causal LM of a supported family, or a PEFT model around one; changed in place.
        config: Settings of what each layer leaves out.
        predictors: Learned predictors for ``policy="predictor"``: a `LeMoPredictor`, or one
            `BlockPredictor` a decoder layer (None for a layer that does not choose). None:
            ``config.predictor`` is loaded.

    Returns:
        The `LeMo` that is now on the model. `remove_lemo` removes it.

    Raises:
        OSError: ``config.predictor`` does not exist or cannot be reached.
        ValueError: LeMo does not support the model or one of its settings, or the config or the
            predictors do not fit the model.
    """
    if hasattr(transformers_model(model), _LEMO):
        raise ValueError("the model already has LeMo on it: call remove_lemo(model) first.")
    family = check(model, config)
    model = transformers_model(model)
    spare_forks()
    lemo = LeMo(model, config, family, predictors)
    setattr(model, _LEMO, lemo)
    train = CudaGraphs(model, lemo.passes) if config.cuda_graphs else stock_call
    train_eagerly(model, partial(_run, train))
    pickle_plain(model, own=(_LEMO, CALL))
    return lemo


def _run(train: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # A deep copy shares this function, and has passes of its own.
    return getattr(model, _LEMO).passes.run(train, model, *args, **kwargs)


def remove_lemo(model: nn.Module) -> None:
    """Restore ``model`` as it was before `apply_lemo`. Without LeMo on it, nothing happens."""
    model = transformers_model(model)
    if hasattr(model, _LEMO):
        getattr(model, _LEMO).remove()
        make_stock(model.modules())  # copies of its layers that somebody has put there
        delattr(model, _LEMO)
        compile_all(model)
        pickle_whole(model)


def take_over(
    model: nn.Module, config: LeMoConfig, predictors: LeMoPredictor | None = None
) -> LeMo:
    """`apply_lemo` for a trainer. LeMo of an earlier trainer is removed, see `end_earlier`.

    Passes are sparse while it trains (`LeMo.training`), and the plain model's at all other times.
    """
    end_earlier(model, config)
    lemo = apply_lemo(model, config, predictors)
    lemo.passes.resting = True
    return lemo


def end_earlier(model: nn.Module, config: LeMoConfig | None) -> None:
    """Remove LeMo that an earlier trainer left on ``model``, and log it.

    Args:
        model: Model as for `apply_lemo`; without LeMo on it, nothing happens.
        config: Settings of the newest trainer; None for dense training.
    """
    lemo = lemo_of(model)
    if lemo is None:
        return
    remove_lemo(model)
    logger.warning(
        "the model had LeMo of an earlier trainer on it (%s); now it has the newest one's (%s).",
        brief(lemo.config),
        None if config is None else brief(config),
    )


def lemo_of(model: nn.Module) -> LeMo | None:
    """The `LeMo` on ``model``, if there is one."""
    return getattr(transformers_model(model), _LEMO, None)


def input_device(model: nn.Module) -> torch.device:
    """The device from which ``model`` reads token ids."""
    return cast(Tensor, transformers_model(model).get_input_embeddings().weight).device
