"""Prompts of LongBench: the middle left out, chat templates, and room for the answer."""

import pytest
import torch
from support.longbench_rows import ROWS, TEMPLATE, row
from support.paths import MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lemo_hf.eval.longbench_load import load_task
from lemo_hf.eval.longbench_prompt import CUT_TOKENS, prompt_tokens, room
from lemo_hf.eval.longbench_tasks import TASKS


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_middle_is_left_out(tokenizer):
    task, first = TASKS["multi_news"], load_task("multi_news", ROWS)[0]
    text = task.prompt.replace("{context}", first["context"])
    whole = tokenizer(text)["input_ids"]
    assert prompt_tokens(task, first, tokenizer, len(whole)) == whole
    for length in (len(whole) - 1, 101, 100):
        half = length // 2
        left, right = (tokenizer.decode(part) for part in (whole[:half], whole[-half:]))
        assert text.startswith(left) and text.endswith(right)
        ids = prompt_tokens(task, first, tokenizer, length)
        assert ids == tokenizer(left + right)["input_ids"]
        assert len(ids) <= length + CUT_TOKENS


def test_halves_of_letters_and_special_tokens(tokenizer):
    """Chinese is cut between the bytes of a letter; special tokens in a text are dropped."""
    task = TASKS["passage_retrieval_zh"]
    for first in load_task("passage_retrieval_zh", ROWS):
        whole = tokenizer(task.prompt.format(**first))["input_ids"]
        for length in range(200, 212):
            half = length // 2
            parts = [tokenizer.decode(ids) for ids in (whole[:half], whole[-half:])]
            ids = prompt_tokens(task, first, tokenizer, length)
            assert ids == tokenizer("".join(parts))["input_ids"]
            assert len(ids) <= length + CUT_TOKENS
    special = row("</s>" + "word " * 500)
    assert tokenizer.eos_token_id in prompt_tokens(TASKS["lcc"], special, tokenizer, 10_000)
    assert tokenizer.eos_token_id not in prompt_tokens(TASKS["lcc"], special, tokenizer, 400)


def with_bos(tokenizer, template=None):
    """The tokenizer, beginning every text with a BOS token as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    names = {"bos_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def test_one_bos_token_however_the_prompt_is_made(tokenizer):
    bos, text = tokenizer.eos_token_id, row("word " * 500)
    for chat in (None, TEMPLATE):
        for length in (10_000, 100):
            ids = prompt_tokens(TASKS["hotpotqa"], text, with_bos(tokenizer, chat), length)
            assert ids[0] == bos and ids.count(bos) == 1


def test_chat_templates(tokenizer):
    assert tokenizer.chat_template is None
    plain = {name: prompt_tokens(t, row("text"), tokenizer, 9999) for name, t in TASKS.items()}
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    for name, task in TASKS.items():
        ids = prompt_tokens(task, row("text"), tokenizer, 9999)
        assert prompt_tokens(task, row("text"), tokenizer, 9999, False) == plain[name]
        if name in {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}:
            assert ids == plain[name]
        else:
            prompt = task.prompt.format(context="text", input="?")
            assert tokenizer.decode(ids) == f"<user>{prompt}<model>"


def test_a_truncated_prompt_is_within_its_template(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    ids = prompt_tokens(TASKS["hotpotqa"], row("word " * 500), tokenizer, 100)
    text = tokenizer.decode(ids)
    assert text.startswith("<user>Answer the question") and text.endswith("Answer:<model>")


def test_room_for_prompt_and_answer(model, tokenizer):
    task = TASKS["hotpotqa"]
    assert room(task, model, tokenizer) == 512 - 32 - CUT_TOKENS
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    template = len(tokenizer("<user>a<model>")["input_ids"])
    assert room(task, model, tokenizer) == 512 - 32 - CUT_TOKENS - template
    assert room(task, model, tokenizer, chat_template=False) == 512 - 32 - CUT_TOKENS
    ids = prompt_tokens(task, row("word " * 600), tokenizer, room(task, model, tokenizer))
    assert 450 < len(ids) <= 512 - 32
