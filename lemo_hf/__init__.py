"""lemo-hf: fine-tune long contexts on the tokens each layer needs.

`LeMoTrainer` takes the place of `transformers.Trainer`; `apply_lemo` does the same to a model under
any other training loop.
"""

from typing import TYPE_CHECKING, Any

from lemo_hf.config import LeMoConfig
from lemo_hf.version import __version__

if TYPE_CHECKING:
    from lemo_hf.patch import apply_lemo, remove_lemo
    from lemo_hf.predictors.predictor_set import LeMoPredictor
    from lemo_hf.trainer import LeMoTrainer

__all__ = [
    "LeMoConfig",
    "LeMoPredictor",
    "LeMoTrainer",
    "__version__",
    "apply_lemo",
    "remove_lemo",
]

_LAZY = {
    "LeMoPredictor": "lemo_hf.predictors.predictor_set",
    "LeMoTrainer": "lemo_hf.trainer",
    "apply_lemo": "lemo_hf.patch",
    "remove_lemo": "lemo_hf.patch",
}


def __getattr__(name: str) -> Any:
    """Import transformers only when something that needs it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
