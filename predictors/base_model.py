"""Which base model predictors were trained for, and whether another one is the same."""

import dataclasses
import logging
import os
from dataclasses import dataclass
from typing import Any

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
    """What tells one base model from another.

    Attributes:
        model_type: Of its config, such as ``"llama"``.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        vocab_size: Rows of the embedding.
        name: Repository it was loaded from; None if it came from a directory, whose path means
            something on one machine only, or was made from scratch.
        commit: Of that repository, or None.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    name: str | None = None
    commit: str | None = None

    @classmethod
    def from_config(cls, config: Any) -> "BaseModel":
        """The facts in a transformers config."""
        heads = config.num_attention_heads
        name = getattr(config, "_name_or_path", None) or None
        if name is not None and os.path.isdir(name):
            name = None
        return cls(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            vocab_size=config.vocab_size,
            name=name,
            commit=getattr(config, "_commit_hash", None) or None,
        )

    def check(self, model: "BaseModel") -> None:
        """Compare with the ``model`` that is to be trained.

        Name, commit and vocabulary may differ (a copy, a fine-tuned model, added tokens): that is
        logged as a warning.

        Raises:
            ValueError: It has another architecture.
        """
        wrong = self._differences(model, _ARCHITECTURE)
        if wrong:
            raise ValueError(
                f"the predictors were trained for another architecture: {wrong}. Use predictors of "
                f"this model (lemo train-predictor makes them; these are {self.name or 'unnamed'}'"
                "s), or policy='pooled', which needs none."
            )
        other = self._differences(model, _IDENTITY)
        if other:
            logger.warning(
                "the predictors were trained on another base model: %s. They fit its shapes; "
                "whether they choose well is not known.",
                other,
            )

    def _differences(self, model: "BaseModel", names: tuple[str, ...]) -> str:
        pairs = [(name, getattr(self, name), getattr(model, name)) for name in names]
        return ", ".join(
            f"{name}={theirs!r} (the model has {ours!r})"
            for name, theirs, ours in pairs
            if theirs != ours and None not in (theirs, ours)  # None: not known
        )

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON knows them."""
        return dataclasses.asdict(self)
