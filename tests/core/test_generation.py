"""Greedy generation: a batch of prompts of different lengths gives what each prompt alone gives."""

import pytest
import torch
from support.models import make_model, with_lora

from lemo_hf.eval.generation import continue_greedily

pytestmark = pytest.mark.oldest


class Numbers:
    """A tokenizer of one word a token: its number."""

    eos_token_id = 2

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == 2))


def greedy(model, prompt, new, ends=(2,), least=0):
    """Token by token, all of the text again for each."""
    ids = list(prompt)
    for step in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if step < least:
            logits[list(ends)] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] in ends:
            break
    return " ".join(str(i) for i in ids[len(prompt) :] if i != 2)


PROMPTS = [list(range(3, 3 + n)) for n in (31, 5, 17, 1)]


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "mistral"])
def test_a_batch_is_greedy_row_by_row(name):
    model = make_model(name).eval()
    model.generation_config.repetition_penalty = 5.0  # as some models have in their files
    model.generation_config.do_sample = True
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert continue_greedily(model, Numbers(), PROMPTS, 12) == expected
    alone = [continue_greedily(model, Numbers(), [prompt], 12) for prompt in PROMPTS]
    assert [text for texts in alone for text in texts] == expected
    assert model.generation_config.repetition_penalty == 5.0
    assert continue_greedily(model, Numbers(), [], 12) == []


def test_stop_tokens_and_least_tokens():
    model = make_model("llama").eval()
    free = [greedy(model, prompt, 12).split() for prompt in PROMPTS]
    stops = [int(free[0][0]), int(free[1][3])]  # at once, and in the middle
    for least in (0, 1, 3):
        expected = [greedy(model, prompt, 12, (2, *stops), least) for prompt in PROMPTS]
        options = {"min_new_tokens": least, "stop_tokens": stops}
        assert continue_greedily(model, Numbers(), PROMPTS, 12, **options) == expected
    assert greedy(model, PROMPTS[0], 12, (2, *stops)) == free[0][0]


def test_the_models_own_end_tokens():
    model = make_model("llama").eval()
    end = int(greedy(model, PROMPTS[0], 12).split()[4])
    model.generation_config.eos_token_id = [2, end]
    expected = [greedy(model, prompt, 12, (2, end)) for prompt in PROMPTS]
    assert continue_greedily(model, Numbers(), PROMPTS, 12) == expected


def test_adapters_take_part():
    model = with_lora(make_model("llama")).eval()
    model.generation_config.repetition_penalty = 5.0
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert continue_greedily(model, Numbers(), PROMPTS, 8) == expected
    with model.disable_adapter():
        assert continue_greedily(model, Numbers(), PROMPTS, 8) != expected


def test_an_empty_prompt():
    with pytest.raises(ValueError, match="has no token"):
        continue_greedily(make_model("llama"), Numbers(), [[3], []], 8)
