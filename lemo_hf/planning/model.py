"""Which models the memory plan knows, and their shapes, from a transformers config alone."""

from dataclasses import dataclass
from typing import Any

from lemo_hf.core.families import family_of

# Gated MLPs, RMSNorm, attention that stores no scores.
PLANNED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "phi3")
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj")
# What to do about a model whose memory is not predicted.
MEASURE = "run a few steps and read lemo/peak_memory_gib in the logs."


@dataclass(frozen=True)
class Linear:
    """Shape of a linear of a layer."""

    width: int
    out: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Elements of weight and bias."""
        return self.width * self.out + (self.out if self.bias else 0)


@dataclass(frozen=True)
class ModelShapes:
    """A causal LM in numbers of elements.

    Attributes:
        hidden: Width of the stream.
        intermediate: Width of the MLP's activation.
        query: Width of all query heads.
        key_value: Width of all key heads, and of all value heads.
        head: Width of one head.
        rotary: Width of cos and sin.
        query_norm: None, or over what queries and keys are normed: each ``"head"``, or ``"all"``.
        norms_behind: Norms follow attention and MLP instead of preceding them (OLMo 2).
        scaled_embeddings: Embeddings are multiplied before the first layer (Granite).
        scaled_updates: What attention and MLP add to the stream is multiplied.
        drops: A dropout (of 0) stands behind the MLP.
        layers: Decoder layers.
        vocabulary: Rows of the embeddings.
        tied: The head's weight is the embeddings'.
        linears: Of one layer, by name.
        window: Longest row that no sliding window cuts, or None.
    """

    hidden: int
    intermediate: int
    query: int
    key_value: int
    head: int
    rotary: int
    query_norm: str | None
    norms_behind: bool
    scaled_embeddings: bool
    scaled_updates: bool
    drops: bool
    layers: int
    vocabulary: int
    tied: bool
    linears: dict[str, Linear]
    window: int | None

    @classmethod
    def of(cls, config: Any) -> "ModelShapes":
        """The shapes of a config.

        Raises:
            ValueError: The memory of such a model would be predicted wrongly.
        """
        _check(config)
        kind, heads = config.model_type, config.num_attention_heads
        hidden, inner = config.hidden_size, config.intermediate_size
        family = family_of(config)
        head = getattr(config, "head_dim", None) or hidden // heads
        query, key_value = heads * head, (config.num_key_value_heads or heads) * head
        bias = getattr(config, "attention_bias", False)
        mlp_bias = getattr(config, "mlp_bias", False)
        reads = bias or kind == "qwen2"
        if kind == "phi3":
            linears = {"qkv_proj": Linear(hidden, query + 2 * key_value)}
        else:
            widths = {"q_proj": query, "k_proj": key_value, "v_proj": key_value}
            linears = {name: Linear(hidden, width, reads) for name, width in widths.items()}
        linears["o_proj"] = Linear(query, hidden, bias)
        width = inner if len(family.gate) == 2 else 2 * inner
        linears |= {name: Linear(hidden, width, mlp_bias) for name in family.gate}
        linears["down_proj"] = Linear(inner, hidden, mlp_bias)
        rope = getattr(config, "rope_parameters", None) or {}
        return cls(
            hidden=hidden,
            intermediate=inner,
            query=query,
            key_value=key_value,
            head=head,
            rotary=int(head * rope.get("partial_rotary_factor", 1)),
            query_norm={"qwen3": "head", "olmo2": "all"}.get(kind),
            norms_behind=family.attention_norm is None,
            scaled_embeddings=kind == "granite",
            scaled_updates=getattr(config, family.residual_scale or "", 1) != 1,
            drops=family.mlp_dropout is not None,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            linears=linears,
            window=_window(config),
        )

    @property
    def table(self) -> int:
        """Parameters of the embeddings, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        norms = {"head": 2 * self.head, "all": self.query + self.key_value}
        linears = sum(linear.parameters for linear in self.linears.values())
        norm = 0 if self.query_norm is None else norms[self.query_norm]
        return 2 * self.hidden + norm + linears

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        tables = self.table if self.tied else 2 * self.table
        return tables + self.layers * self.layer_parameters + self.hidden

    @property
    def attention(self) -> tuple[str, ...]:
        """Names of attention's linears."""
        return self.named((*ATTENTION_INPUTS, "o_proj"))

    def named(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the names that a layer has."""
        return tuple(name for name in names if name in self.linears)


def _check(config: Any) -> None:
    kind = config.model_type
    if kind not in PLANNED:
        raise ValueError(
            f"the memory of {kind!r} is not predicted, only that of {', '.join(PLANNED)}: {MEASURE}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "the config is that of quantised weights: give the unquantised model's, and "
            "load_in_4bit or load_in_8bit."
        )
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in (None, "sdpa") and "flash" not in implementation:
        raise ValueError(
            f"attn_implementation={implementation!r} is not predicted: use 'sdpa', which stores no "
            "scores."
        )
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(config, name, 0):
            raise ValueError(
                f"the config's {name}={getattr(config, name)} is not predicted: {MEASURE}"
            )


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None
