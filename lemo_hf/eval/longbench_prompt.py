"""Prompts of LongBench in tokens: truncation in the middle, and the chat template."""

from typing import Any

from torch import nn

from lemo_hf.eval.longbench_tasks import Task
from lemo_hf.patch import transformers_model

# The text of the two halves has other tokens where they meet, and may have a few more.
CUT_TOKENS = 16


def prompt_tokens(
    task: Task, row: dict[str, Any], tokenizer: Any, max_length: int, chat_template: bool = True
) -> list[int]:
    """Token ids of the prompt, as the benchmark makes them.

    A prompt of more than ``max_length`` tokens keeps half of that number from each end, where its
    question stands. The halves become text again, without special tokens, which is tokenised. The
    chat template comes on top of ``max_length``.

    Args:
        task: Task of the row.
        row: Mapping with ``context`` and ``input``.
        tokenizer: Tokenizer of the model.
        max_length: Greatest number of tokens; the middle of a longer prompt is left out.
        chat_template: Whether to use the tokenizer's chat template, if it has one and the task uses
            one.
    """
    text = task.prompt.format(context=row["context"], input=row["input"])
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) > max_length:
        half = max_length // 2
        halves = (ids[:half], ids[-half:])
        text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in halves)
        ids = tokenizer(text, verbose=False)["input_ids"]
    if chat_template and uses_chat_template(task, tokenizer):
        return _as_message(text, tokenizer)
    return ids


def uses_chat_template(task: Task, tokenizer: Any) -> bool:
    """Whether the task's prompts get a chat template: the task uses one, and the tokenizer has
    one."""
    return task.chat_template and getattr(tokenizer, "chat_template", None) is not None


def room(task: Task, model: nn.Module, tokenizer: Any, chat_template: bool = True) -> int | None:
    """Largest ``max_length`` with which prompt and answer fit the model's context for certain.

    It is the model's ``max_position_embeddings`` less the task's new tokens, the chat template's
    and `CUT_TOKENS`. None if the config has no such number.
    """
    context = context_of(model)
    if context is None:
        return None
    around = chat_template and uses_chat_template(task, tokenizer)
    template = len(_as_message("a", tokenizer)) if around else 0
    return context - task.max_new_tokens - template - CUT_TOKENS


def context_of(model: nn.Module) -> int | None:
    """Number of tokens of the model's context by its config, or None."""
    config = transformers_model(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _as_message(text: str, tokenizer: Any) -> list[int]:
    message = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens that it wants, a BOS among them.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
