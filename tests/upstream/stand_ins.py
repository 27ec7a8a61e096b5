"""Small local models and data sets under the names that transformers' and TRL's tests download.

A test that runs in the folder made here finds ``org/name`` as a path, before a hub is asked.
Weights are random, texts are the Zen of Python, chat templates those of the installed TRL. What has
no stand-in fails with the stock trainer as well, and is counted so.
"""

import codecs
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

END, PAD = "<|im_end|>", "<|endoftext|>"
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # every parameter must have a gradient that moves it
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Name: model type, chat template, what differs from SMALL.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "llama3", {}),
    "trl-internal-testing/tiny-Cohere2ForCausalLM": ("cohere2", "cohere2", {}),
    "trl-internal-testing/tiny-GPTNeoXForCausalLM": ("gpt_neox", "", {}),
    "trl-internal-testing/tiny-Glm4MoeForCausalLM": (
        "glm4_moe",
        "glm4moe",
        {"n_routed_experts": 4, **EXPERTS},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "gpt_oss",
        "gptoss",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "trl-internal-testing/tiny-Lfm2ForCausalLM": (
        "lfm2",
        "lfm2",
        {"full_attn_idxs": [1], "block_multiple_of": 8},
    ),
    "trl-internal-testing/tiny-Lfm2ForCausalLM-2.5": (
        "lfm2",
        "lfm2_2_5",
        {"full_attn_idxs": [1], "block_multiple_of": 8},
    ),
    "trl-internal-testing/tiny-LlamaForCausalLM-3.2": ("llama", "llama3_2", {}),
    "trl-internal-testing/tiny-MistralForCausalLM-0.2": ("mistral", "", {}),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": (
        "nemotron_h",
        "nemotron_3_nano",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "n_groups": 1,
            "ssm_state_size": 16,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 32,
            **EXPERTS,
        },
    ),
    "trl-internal-testing/tiny-Olmo3ForCausalLM": ("olmo3", "", {}),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("qwen2", "qwen2_5", {}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("qwen3", "qwen3", {}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "qwen3_moe",
        "qwen3",
        {"num_experts": 4, **EXPERTS},
    ),
    "Qwen/Qwen3-4B": ("qwen3", "qwen3", {}),
}


def zen() -> list[str]:
    """The aphorisms of `import this`."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return [line for line in codecs.decode(this.s, "rot13").splitlines()[1:] if line]


def make_stand_ins(folder: Path) -> None:
    """Write all stand-ins into ``folder``, by the names of their repositories."""
    for name, (kind, template, changes) in MODELS.items():
        tokenizer = _tokenizer(template)
        tokenizer.save_pretrained(folder / name)
        set_seed(0)
        config = AutoConfig.for_model(
            kind,
            **{**SMALL, **changes},
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    for name, configs in _data_sets().items():
        _write_data_set(folder / name, configs)


def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = [PAD, "<|im_start|>", END, "<think>", "</think>", "<tool_call>", "</tool_call>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(zen(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    spec = find_spec("trl")
    if template and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "chat_templates" / f"{template}.jinja"
        fast.chat_template = path.read_text()
    return fast


def _data_sets() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows by repository and config."""
    texts = zen()
    return {
        "trl-internal-testing/zen": {
            "standard_language_modeling": [{"text": text} for text in texts],
            "standard_prompt_completion": [
                {"prompt": prompt, "completion": rest} for prompt, rest in map(_halves, texts)
            ],
            "standard_implicit_prompt_preference": [
                {
                    "chosen": row["prompt"] + row["chosen"],
                    "rejected": row["prompt"] + row["rejected"],
                }
                for row in _preferences(texts, _long_halves)
            ],
            "standard_preference": _preferences(texts, _long_halves),
            "conversational_implicit_prompt_preference": [
                {
                    "chosen": row["prompt"] + row["chosen"],
                    "rejected": row["prompt"] + row["rejected"],
                }
                for row in _preferences(texts, _turns)
            ],
            "conversational_preference": _preferences(texts, _turns),
            "conversational_language_modeling": [{"messages": list(_chat(t))} for t in texts],
            "conversational_prompt_completion": _prompts(texts, _chat),
        },
        "trl-internal-testing/harmony": {
            "language_modeling": [{"messages": list(_thought(t))} for t in texts],
            "prompt_completion": _prompts(texts, _thought),
            "preference": _preferences(texts, lambda t: tuple([turn] for turn in _thought(t))),
        },
        "trl-internal-testing/toolcall": {
            "language_modeling": [_tool_row(t) for t in texts],
            "preference": [_tool_pair(*pair) for pair in zip(texts, reversed(texts), strict=True)],
        },
        "Salesforce/wikitext": {
            "wikitext-2-raw-v1": [{"text": " ".join(texts[i:] + texts[:i])} for i in range(19)] * 12
        },
    }


def _halves(text: str) -> tuple[str, str]:
    words = text.split(" ")
    half = len(words) // 2
    return " ".join(words[:half]), " " + " ".join(words[half:])


def _long_halves(text: str) -> tuple[str, str]:
    """Four lines stand before the one whose end is asked: a part of the prompt can be left out."""
    texts = zen()
    place = texts.index(text)
    begin, end = _halves(text)
    return "\n".join([*(texts[place - i] for i in (4, 3, 2, 1)), begin]), end


def _chat(text: str) -> Iterator[dict[str, str]]:
    yield {"role": "user", "content": f"How does it go on: {_halves(text)[0]}?"}
    yield {"role": "assistant", "content": text}


def _thought(text: str) -> Iterator[dict[str, str]]:
    question, answer = _chat(text)
    yield question
    yield {**answer, "thinking": "It is a line of the Zen of Python."}


def _prompts(texts: list[str], talk: Callable) -> list[dict[str, Any]]:
    return [{"prompt": [q], "completion": [a]} for q, a in map(talk, texts)]


def _turns(text: str) -> tuple[list, list]:
    _, answer = _chat(text)
    question = {"role": "user", "content": f"How does it go on: {_long_halves(text)[0]}?"}
    return [question], [answer]


def _preferences(texts: list[str], parts: Callable) -> list[dict[str, Any]]:
    """Each text's end against that of another."""
    rows = [parts(text) for text in texts]
    return [
        {"prompt": prompt, "chosen": rest, "rejected": other}
        for (prompt, rest), (_, other) in zip(rows, reversed(rows), strict=True)
    ]


def _tool_row(text: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"start": {"type": "string", "description": "How the line begins."}},
        "required": ["start"],
    }
    function = {"name": "find_line", "description": "Finds a line.", "parameters": parameters}
    question, answer = _chat(text)
    call = {"name": "find_line", "arguments": {"start": _halves(text)[0]}}
    return {
        "messages": [
            question,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "name": "find_line", "content": text},
            answer,
        ],
        "tools": json.dumps([{"type": "function", "function": function}]),
    }


def _tool_pair(text: str, other: str) -> dict[str, Any]:
    """The right call of a tool against another; with its prompt in the 512 tokens of the test."""
    row, worse = _tool_row(text), _tool_row(other)
    (tool,) = json.loads(row["tools"])
    tool["function"]["parameters"] = {"type": "object", "properties": {"start": {}}}
    return {
        "prompt": row["messages"][:1],
        "chosen": row["messages"][1:2],
        "rejected": worse["messages"][1:2],
        "tools": json.dumps([tool]),
    }


def _write_data_set(folder: Path, configs: dict[str, list[dict[str, Any]]]) -> None:
    """Two splits a config, and the README that tells `load_dataset` which file is which."""
    readme = ["---", "configs:"]
    for config, rows in configs.items():
        readme += [f"- config_name: {config}", "  data_files:"]
        for split, part in (("train", rows[:-2]), ("test", rows[-2:])):
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
            readme += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*readme, "---", ""]))
