"""Greedy continuations of prompts of different lengths, in one batch."""

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lemo_hf.patch import input_device, transformers_model


@torch.no_grad()
def continue_greedily(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    min_new_tokens: int = 0,
    stop_tokens: Collection[int] = (),
) -> list[str]:
    """Continue each prompt, token by token the most likely one.

    Only the end tokens of the model's generation config are used: no sampling, and no penalty,
    which would count the padding of shorter prompts as text. So a row's result does not depend on
    the rest of the batch, up to the rounding of the model's dtype.

    Args:
        model: Causal LM or a PEFT model around one, in evaluation mode.
        tokenizer: Tokenizer of the model.
        prompts: Token ids, one list a prompt; shorter ones are padded on the left.
        max_new_tokens: Greatest number of new tokens.
        min_new_tokens: Least number of new tokens; no end or stop token comes before.
        stop_tokens: Tokens that end a row, besides the end tokens of the tokenizer and the model.

    Returns:
        New text of each row, without special tokens; a stop token that is text is part of it.

    Raises:
        ValueError: A prompt is empty.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise ValueError("a prompt has no token: give at least one.")
    inner = transformers_model(model)
    ends = {*_end_tokens(inner, tokenizer), *stop_tokens}
    longest, device = max(map(len, prompts)), input_device(model)
    # Padding is masked, so that any token serves as such.
    ids = torch.full((len(prompts), longest), next(iter(ends), 0))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        do_sample=False,
        num_beams=1,
        use_cache=True,  # Trainer leaves models with use_cache=False
        eos_token_id=sorted(ends) or None,
        pad_token_id=next(iter(ends), 0),
    )
    # generate fills what a config leaves open from the model's own.
    own, inner.generation_config = inner.generation_config, config
    try:
        out = cast(Any, model).generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    finally:
        inner.generation_config = own
    new = out[:, longest:].tolist()
    return [tokenizer.decode(_ended(row, ends), skip_special_tokens=True) for row in new]


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    of_model = model.generation_config.eos_token_id
    tokens = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    return tokens - {None}


def _ended(row: list[int], ends: set[int]) -> list[int]:
    """A row's tokens up to the first end token; the rest is padding."""
    first = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: first + 1]
