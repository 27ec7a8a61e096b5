"""The model that LeMo works on, inside the model that the user gives."""

from typing import cast

from torch import nn
from transformers import PreTrainedModel


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT or a compiled model, or ``model`` itself."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if base is None else base())
