"""Merging of an adapter into its model's weights, and a check that nothing else changed."""

import warnings
from typing import Any

import torch
from torch import nn

TOKENS = 32
# How far logits may be from the adapted model's, against the largest. Rounding of merged weights
# gave up to 2e-6, 5e-3 and 5e-2 in the families' small models; a wrong merge is off by about what
# the adapter does, which a 16-bit model shows where that is more than rounding.
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def probe(tuned: Any) -> torch.Tensor:
    """A row of tokens from the whole vocabulary, including those whose rows the adapter stores."""
    rows = tuned.get_base_model().config.get_text_config().vocab_size
    spread = torch.linspace(0, rows - 1, TOKENS).round().long().tolist()
    trained = getattr(tuned.active_peft_config, "trainable_token_indices", None) or []
    own = trained if isinstance(trained, list) else [i for end in trained.values() for i in end]
    return torch.tensor([[*spread, *own[:TOKENS]]])


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a row, in fp32.

    Raises:
        ValueError: The logits are not finite.
    """
    found = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    if not found.isfinite().all():
        kind = str(model.dtype).removeprefix("torch.")
        raise ValueError(f"the model's logits are not finite in {kind}: give another --dtype.")
    return found


def merged(tuned: Any, progress: bool) -> Any:
    """The plain model whose weights hold the adapter's, in the dtypes of the base model.

    Embeddings and head that share a weight still do only if the adapter changes both in the same
    way.

    Raises:
        ValueError: This kind of adapter cannot be merged.
    """
    lm, kind = tuned.get_base_model(), tuned.active_peft_config.peft_type
    name = getattr(kind, "value", kind)
    if not hasattr(tuned.base_model, "merge_and_unload"):
        raise ValueError(f"PEFT's {name} changes no weights, so there is nothing to merge.")
    tied = lm.config.get_text_config().tie_word_embeddings
    dtypes = {name: parameter.dtype for name, parameter in lm.named_parameters()}
    _unshare(lm)
    try:
        with warnings.catch_warnings():  # of PEFT's, about tied weights, which are apart by now
            warnings.filterwarnings("ignore", "(?s).*(tie_word_embeddings|no longer tied)")
            plain = tuned.merge_and_unload(progressbar=progress, safe_merge=True)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"this adapter of PEFT's {name} cannot be merged: {error}") from error
    if tied:
        read, head = plain.get_input_embeddings(), plain.get_output_embeddings()
        tied = torch.equal(read.weight, head.weight)
        if tied:
            head.weight = read.weight
        plain.config.get_text_config().tie_word_embeddings = tied
        plain.config.tie_word_embeddings = tied
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, plain.dtype))
    return plain


def _unshare(lm: Any) -> None:
    """Give modules that share weights weights of their own: an adapter may change one and not the
    other."""
    seen: set[int] = set()
    for module in lm.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) in seen:
                own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                setattr(module, name, own)
            seen.add(id(weight))


def difference(found: torch.Tensor, expected: torch.Tensor, model: Any, what: str) -> float:
    """Greatest difference of a model's logits from the expected ones, divided by the largest of
    these.

    Raises:
        ValueError: The difference is larger than rounding explains.
    """
    share, dtype = torch.inf, model.dtype
    if found.shape == expected.shape:
        off = (found - expected).abs().amax(-1) / expected.abs().max()
        # After rounding a router may send single tokens to other experts.
        share = float(off.median() if _routes(model.config.get_text_config()) else off.max())
    limit = ROUNDING.get(dtype, 1e-3)
    if not share <= limit:
        raise ValueError(
            f"{what} does not merge exactly: the merged model's logits differ from the adapted "
            f"model's by {share:.2g} of the largest, and rounding to "
            f"{str(dtype).removeprefix('torch.')} explains {limit:g}. Nothing was written: try "
            "--dtype float32, or use the adapter without merging."
        )
    return share


def _routes(config: Any) -> bool:
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
