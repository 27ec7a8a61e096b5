"""The images of a call of a multimodal model."""

from typing import Any

from torch import Tensor, nn

from lemo_hf.batch.images import image_tokens
from lemo_hf.core.families import MULTIMODAL

# Parts of the names of arguments that carry images, videos and sound.
GIVEN = ("pixel", "image", "video", "input_features", "mm_encoder_outputs")
MARKS = ("token_type_ids", "mm_token_type_ids")  # 0: text


def images_of(model: nn.Module, kwargs: dict[str, Any], pairs: bool = False) -> Tensor | None:
    """Where the tokens of images, videos and sound are, ``[B, T]`` bool; None for text alone.

    Args:
        model: The model.
        kwargs: Arguments of the call.
        pairs: Whether rows are two answers to one prompt.

    Raises:
        ValueError: It cannot be known which tokens belong to one image.
    """
    config: Any = model.config
    if config.model_type not in MULTIMODAL:
        return None
    given = [
        name
        for name, value in kwargs.items()
        if value is not None and name not in MARKS and any(part in name for part in GIVEN)
    ]
    positions = kwargs.get("position_ids")
    if positions is not None and positions.dim() > 2:
        raise ValueError(
            f"position_ids of {positions.dim()} dimensions are places in images, and documents "
            "that are packed are not seen in them. Leave position_ids out: the model makes them."
        )
    marks = [kwargs[name] for name in MARKS if kwargs.get(name) is not None]
    if not given:
        if any(bool(mark.any()) for mark in marks):
            raise ValueError(
                "token types other than 0 mark images, and the call has none: leave "
                f"{' and '.join(name for name in MARKS if kwargs.get(name) is not None)} out."
            )
        return None
    ids, names = kwargs.get("input_ids"), ", ".join(given)
    if ids is None:
        raise ValueError(
            f"{names}: images are found among input_ids, and the call has inputs_embeds. Give the "
            "model input_ids, or call remove_lemo(model) for these batches."
        )
    if pairs:
        raise ValueError(
            f"{names}: preference training takes text alone. Leave images out, or use TRL's own "
            "DPOTrainer without LeMo."
        )
    images = image_tokens(ids, config)
    for mark in marks:
        images = images | (mark != 0)
    return images
