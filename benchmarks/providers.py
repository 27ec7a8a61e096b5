"""Who takes a step: Hugging Face, Liger, S2-Attn, LeMo, each with its options; one row each."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import s2_attention
from liger_twin import liger_names, liger_twin
from torch import nn
from uniform_offload import equal_shares

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.lemo import LeMo

HOST_GIB = 100.0  # pinned memory that LeMo's offload may take
SOME_GIB = 8.0  # a budget that does not take everything at 64K
# Levels by layer: at 64K 103 GiB (in FP8 109), and in FP8 119.
SOME_STORED = ("selective",) * 8 + ("none",) * 24
MOST_STORED = ("selective",) * 4 + ("none",) * 28
# A policy that reads the stream: the default would cost less.
LEMO = {"retention": 0.5, "dense_first_layers": 4, "policy": "pooled"}


@dataclass(frozen=True)
class Provider:
    """One row of the comparison.

    Attributes:
        name: In results.
        kind: "hf", "liger", "s2attn" or "lemo".
        checkpointing: Of transformers, as ``TrainingArguments`` turns it on.
        offload: Of transformers' checkpointing.
        selective: Of Axolotl: checkpointing that stores what attention returns.
        lemo: Fields of `LeMoConfig`.
        equal_shares: LeMo's offload gives each layer the same part of its budget.
    """

    name: str
    kind: str
    checkpointing: bool = False
    offload: bool = False
    lemo: dict = field(default_factory=dict)
    equal_shares: bool = False
    selective: bool = False


def rivals(kind: str) -> list[Provider]:
    """Without checkpointing, and with each kind of it; Axolotl's where it is installed."""
    found = [
        Provider(kind, kind),
        Provider(f"{kind}+checkpointing", kind, True),
        Provider(f"{kind}+checkpointing+offload", kind, True, True),
    ]
    if find_spec("axolotl"):
        found.append(Provider(f"{kind}+axolotl", kind, True, selective=True))
    return found


def _lemo(suffix: str, *, checkpointing: bool = False, **options) -> Provider:
    own = {name: options.pop(name) for name in ("offload", "equal_shares") if name in options}
    return Provider(f"lemo{suffix}", "lemo", checkpointing, lemo=LEMO | options, **own)


PROVIDERS = {
    provider.name: provider
    for provider in (
        *rivals("hf"),
        *rivals("liger"),
        Provider("s2attn", "s2attn"),
        _lemo(""),
        _lemo("+graph", cuda_graphs=True),
        _lemo("+fp8", fp8=True),
        _lemo("+fp8+checkpointing", checkpointing=True, fp8=True),
        _lemo("+some-mlp", recompute=("mlp",) * 14 + ("none",) * 18),
        _lemo("+mlp", recompute="mlp"),
        _lemo("+selective", recompute="selective"),
        _lemo("+full", recompute="full"),
        _lemo("+checkpointing", checkpointing=True),
        _lemo("+some-stored", recompute=SOME_STORED),
        _lemo("+fp8+some-stored", recompute=SOME_STORED, fp8=True),
        _lemo("+fp8+most-stored", recompute=MOST_STORED, fp8=True),
        _lemo("+offload", checkpointing=True, offload_gib=HOST_GIB),
        _lemo("+full+offload", recompute="full", offload_gib=HOST_GIB),
        _lemo("+some-offload", checkpointing=True, offload_gib=SOME_GIB),
        _lemo("+some-offload-uniform", checkpointing=True, offload_gib=SOME_GIB, equal_shares=True),
        # Without dense layers, and with less kept.
        _lemo("-all+offload", recompute="full", offload_gib=HOST_GIB, dense_first_layers=0),
        _lemo(
            "-all-0.3+offload",
            recompute="full",
            offload_gib=HOST_GIB,
            dense_first_layers=0,
            retention=0.3,
        ),
        # For rows of which a part is labelled: the default policy, and no dense layer.
        *(
            Provider(f"lemo {share:g}{way}", "lemo", True, lemo={"retention": share, **options})
            for share in (0.3, 0.1)
            for way, options in (("+checkpointing", {}), ("+offload", {"offload_gib": HOST_GIB}))
        ),
        # On the compute stream, whatever a layer keeps.
        _lemo("+transformers-offload", checkpointing=True, offload=True),
    )
}


def provider_of(name: str) -> Provider:
    """The row of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in PROVIDERS:
        raise ValueError(f"no provider {name!r}; there are {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


def lemo_config(provider: Provider, options: dict) -> LeMoConfig | None:
    """What it leaves out; None for rivals. ``options`` of the command line come last."""
    return LeMoConfig(**{**provider.lemo, **options}) if provider.kind == "lemo" else None


class Models:
    """The model all providers run, and Liger's twin on its weights."""

    def __init__(self, model: nn.Module, title: str):
        self.model, self.title = model, title
        self._twin: nn.Module | None = None

    @property
    def twin(self) -> nn.Module:
        """Made when it is first asked for."""
        if self._twin is None:
            self._twin = liger_twin(self.model, self.title)
        return self._twin


@contextmanager
def provider_on(
    models: Models, provider: Provider, options: dict
) -> Iterator[tuple[nn.Module, LeMo | None]]:
    """The model that runs, with ``provider`` on it for a while."""
    model = models.twin if provider.kind == "liger" else models.model
    base = model.get_base_model()
    config = lemo_config(provider, options)
    with ExitStack() as stack:
        if provider.kind == "liger":
            stack.enter_context(liger_names())
        if provider.kind == "s2attn":
            s2_attention.register()
            name = patch.object(base.config, "_attn_implementation_internal", s2_attention.NAME)
            stack.enter_context(name)
        if provider.equal_shares:
            stack.enter_context(equal_shares())
        if provider.checkpointing:
            stack.callback(_checkpointing_off, base)
            how: dict[str, Any] = {"use_reentrant": False}
            if provider.selective:
                how["context_fn"] = _storing_attention()
            base.gradient_checkpointing_enable(how, offload=provider.offload)
        lemo = None
        if config is not None:
            stack.callback(remove_lemo, model)
            lemo = apply_lemo(model, config)
        yield model, lemo


def _storing_attention() -> Callable:
    """What Axolotl's ``selective_checkpointing: true`` gives to transformers' checkpointing."""
    from axolotl.monkeypatch.selective_checkpointing import build_sac_context_fn

    return build_sac_context_fn()


def _checkpointing_off(base: nn.Module) -> None:
    base.gradient_checkpointing_disable()
    base.disable_input_require_grads()  # hooks that enabling adds and disabling leaves
