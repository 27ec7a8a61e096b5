"""Checks for several processes that share one sequence; an error names the value and the way
out."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo_hf.config import LeMoConfig
from lemo_hf.core.families import MULTIMODAL
from lemo_hf.core.family import Family

ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")


def check_sequence_model(config: LeMoConfig, model: PreTrainedModel, family: Family) -> None:
    """Raises ValueError for models and policies whose sequences cannot be shared."""
    size = config.sequence_parallel_size
    prefix = f"sequence_parallel_size={size}"
    if model.config.model_type in MULTIMODAL:
        raise ValueError(
            f"{prefix} is not supported for {type(model).__name__}, whose language model is inside "
            "another model: use one process a sequence."
        )
    heads = model.config.num_attention_heads
    if heads % size:
        raise ValueError(
            f"{prefix} does not divide the {heads} attention heads of {type(model).__name__}, "
            "which the processes share: use a size that divides them."
        )
    implementation = model.config._attn_implementation
    if implementation not in ATTENTIONS:
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported with {prefix}: use one of "
            f"{', '.join(ATTENTIONS)}."
        )
    if config.policy == "oracle":
        raise ValueError(
            f"policy='oracle' compares queries and keys of the whole sequence, which no process "
            f"has with {prefix}: use policy='pooled' or 'predictor'."
        )
    own = family.own_attention or family.recurrent is not None or family.layer_scale is not None
    if family.reads_positions or own:
        raise ValueError(
            f"layers of {type(model).__name__} read more inputs than their rows and rotary tables, "
            f"which is not supported with {prefix}: use one process a sequence."
        )
    inner = model.get_submodule(family.layers.rpartition(".")[0])
    if not hasattr(inner, "rotary_emb"):
        raise ValueError(
            f"{type(model).__name__} adds learned positions to its embeddings, which is not "
            f"supported with {prefix}: use a model with rotary positions."
        )


def check_sequence_call(
    config: LeMoConfig,
    layers: list[nn.Module],
    family: Family,
    kwargs: dict[str, Any],
    main: Tensor,
) -> None:
    """Raises ValueError for a batch that cannot be shared.

    Args:
        config: The user's settings.
        layers: Decoder layers.
        family: Names of their parts.
        kwargs: Arguments of the call of the causal LM.
        main: Input of the call, ids ``[B, T]`` or embeddings ``[B, T, H]``.
    """
    size, block = config.sequence_parallel_size, config.block_size
    prefix = f"sequence_parallel_size={size}"
    batch, tokens = main.shape[:2]
    if batch != 1:
        raise ValueError(
            f"{prefix} takes one sequence at a time, and the batch has {batch}: set "
            "per_device_train_batch_size=1, and raise gradient_accumulation_steps instead."
        )
    if tokens <= block * (size - 1):
        raise ValueError(
            f"a sequence of {tokens} tokens has fewer blocks of block_size={block} than {prefix}: "
            "use longer sequences or a smaller block_size."
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
        raise ValueError(
            f"padding and attention masks are not supported with {prefix}: a batch of one sequence "
            "needs none. Leave attention_mask and pad_to_multiple_of unset."
        )
    positions = kwargs.get("position_ids")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if packed or (positions is not None and bool((positions.diff(dim=1) != 1).any())):
        raise ValueError(
            f"packed documents are not supported with {prefix}: train on one document at a time."
        )
    for layer in layers:
        attention = getattr(layer, family.attention)
        window = getattr(attention.config, "sliding_window", None)
        window = getattr(attention, "sliding_window", window)  # None where only other layers slide
        if window is not None and window < tokens:
            raise ValueError(
                f"a sliding window of {window} tokens, shorter than the sequence ({tokens}), is "
                f"not supported with {prefix}."
            )


def check_sequence_loss(config: LeMoConfig, labelled: bool, own: bool) -> None:
    """Raises ValueError unless a pass computes its own loss.

    Args:
        config: The user's settings.
        labelled: Whether the pass was given labels.
        own: Whether its loss is the model class's, which LeMo replaces.
    """
    if not (labelled and own):
        raise ValueError(
            f"sequence_parallel_size={config.sequence_parallel_size} needs the model's own loss, "
            "made from labels: each process has only the logits of its part of the sequence. "
            "Leave out compute_loss_func, label_smoothing_factor, use_liger_kernel and patched "
            "forwards."
        )
