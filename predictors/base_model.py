"""The base model that predictors were trained for, and its comparison with another model."""

import dataclasses
import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lemo_hf.shown import shown

logger = logging.getLogger(__name__)

_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# A vocabulary with tokens added feeds the layers the same stream.
_IDENTITY = ("name", "commit", "vocab_size")


@dataclass(frozen=True)
class BaseModel:
    """Facts that tell one base model from another.

    Attributes:
        model_type: Type in its config, such as ``"llama"``.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        vocab_size: Number of rows of the embedding.
        name: Repository it was loaded from; None if it was made from scratch or loaded from a
            directory, whose path means nothing on other machines.
        commit: Commit of that repository, or None.
        fingerprint: Fingerprint of its weights, see `fingerprint_of`; None if not known.

    Raises:
        ValueError: A fact has the wrong type.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    name: str | None = None
    commit: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), cast(Any, field.type)
            if isinstance(value, bool) or not isinstance(value, kind):
                kind = getattr(kind, "__name__", kind)
                raise ValueError(
                    f"{field.name} of the base model must be {kind}, got {shown(value)}"
                )

    @classmethod
    def from_config(cls, config: Any) -> "BaseModel":
        """The facts in a transformers config."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        name = getattr(config, "_name_or_path", None) or None
        if name is not None and os.path.isdir(name):
            name = None
        return cls(
            model_type=config.model_type,
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            vocab_size=text.vocab_size,
            name=name,
            commit=getattr(config, "_commit_hash", None) or None,
        )

    @classmethod
    def of_model(cls, model: Any) -> "BaseModel":
        """The facts in a transformers model, with the fingerprint of its weights."""
        facts = cls.from_config(model.config)
        return dataclasses.replace(facts, fingerprint=fingerprint_of(model))

    def same_architecture(self, model: "BaseModel") -> bool:
        """Whether predictors for this model have the shapes of the other."""
        return not self._differences(model, _ARCHITECTURE)

    def check(self, model: "BaseModel") -> None:
        """Compare with the ``model`` that is to be trained.

        Other weights cause only a warning, since predictors may work for a fine-tuned model. Name,
        commit and vocabulary are compared if the weights of one of the two are not known.

        Raises:
            ValueError: The model has another architecture.
        """
        wrong = self._differences(model, _ARCHITECTURE)
        if wrong:
            raise ValueError(
                f"the predictors were trained for another architecture: {wrong}. Use predictors of "
                "this model (lemo train-predictor makes them; these were made for "
                f"{self.name or 'an unnamed model'}), or policy='overlap', which needs none."
            )
        known = None not in (self.fingerprint, model.fingerprint)
        other = self._differences(model, ("fingerprint",) if known else _IDENTITY)
        if other:
            logger.warning(
                "the predictors were trained on another base model (%s): %s. They fit this model's "
                "shapes, but may not choose well for it.",
                self.name or "unnamed",
                other,
            )

    def _differences(self, model: "BaseModel", names: tuple[str, ...]) -> str:
        pairs = [(name, getattr(self, name), getattr(model, name)) for name in names]
        return ", ".join(
            f"{name}={shown(theirs)} (the model has {shown(ours)})"
            for name, theirs, ours in pairs
            if theirs != ours and None not in (theirs, ours)  # None: not known
        )

    def to_dict(self) -> dict[str, Any]:
        """The facts, as a dictionary for JSON."""
        return dataclasses.asdict(self)


def fingerprint_of(model: Any) -> str | None:
    """A SHA-256 of a sample of a model's weights, which survives casts and most quantisation.

    The sample has the weights of all norms, and the first 64 numbers of the first 256 embeddings:
    the usual quantisations and adapters do not change them, and added tokens come after them.
    Numbers are rounded to bf16 and then to 1/1024, so that fp32, bf16 and fp16 copies of one
    checkpoint agree (fp16 copies of fp32 checkpoints may not).

    Args:
        model: Transformers model on any device.

    Returns:
        64 hexadecimal digits; None if weights cannot be read: on the meta device, or split by FSDP
        or ZeRO-3.
    """
    embedding = model.get_input_embeddings().weight
    norms = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name.endswith(".weight") and "lora_" not in name
    ]
    tensors = [embedding, *norms]
    if not all(map(_readable, tensors)):
        return None
    digest = hashlib.sha256()
    for tensor in (embedding[:256, :64], *norms):
        sample = tensor.detach().to(torch.bfloat16).float().mul(1024).round()
        digest.update(sample.int().cpu().contiguous().numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def _readable(tensor: Tensor) -> bool:
    whole = type(tensor) in (Tensor, nn.Parameter) and tensor.numel() > 0
    return whole and not tensor.is_meta and tensor.is_floating_point()
