"""All checks of a model and a config, before the model is changed."""

from torch import nn

from lemo_hf.config import LeMoConfig, check_config
from lemo_hf.core.checks import check_adapters, check_layers, check_model
from lemo_hf.core.family import Family
from lemo_hf.core.family_checks import check_family, check_shared_keys
from lemo_hf.core.inner_model import transformers_model
from lemo_hf.core.sequence_checks import check_sequence_model


def check(model: nn.Module, config: LeMoConfig) -> Family:
    """Check that LeMo can train a model as a config says.

    Predictors are checked when they are loaded, and batches in their pass.

    Args:
        model: Causal LM, or a PEFT model around one.
        config: The user's settings.

    Returns:
        The model's family.

    Raises:
        ValueError: LeMo cannot; the message names the value and the way out.
    """
    check_config(config)
    check_adapters(model)
    inner = transformers_model(model)
    family = check_model(inner)
    check_layers(inner, family)
    config.layer_rules(len(inner.get_submodule(family.layers)))  # type: ignore[arg-type]
    check_family(config, family, inner.config.model_type)
    if family.shares_keys:
        check_shared_keys(config, inner.config.get_text_config())
    if config.sequence_parallel_size > 1:
        check_sequence_model(config, inner, family)
    return family
