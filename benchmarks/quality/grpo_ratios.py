"""GRPO's importance ratios where the sampler reads the whole prompt and the learner a part of it.

Completions are sampled from the dense model, and no step is taken: a learner that reads what the
sampler has read has ratios of 1, so whatever departs from it is what leaving tokens out costs. The
prompt's blocks are chosen once for a group of completions, which are kept whole, as
`LeMoDPOTrainer` does for two. A pass is then the stock model on kept tokens at their places, so
that a group shares the keys and values of its prompt; that this is LeMo's own pass is checked on
two completions of the first prompt.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.quality.texts import Texts
from benchmarks.record import command_line, environment, save
from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.batch.selection import keep_blocks
from lemo_hf.core.pair_sets import PairSets
from lemo_hf.core.policies import rank
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.predictors.training_free import ranks

RETENTIONS = (0.5, 0.3, 0.15)
# What DPO does; the same for what the end of the prompt asks; the last blocks; a shorter prompt.
WAYS = ("auto", "asked by the prompt", "recent", "cut")
ROUNDED = "dense in bf16"  # what rounding alone makes
TASKS = ("continue", "summary")
REQUEST = "\n\nTell in a few sentences what happens in this part of a book."
ASKING = 64  # tokens at the end of a prompt that ask for others
CLIP = 0.2  # of PPO and GRPO
MOST = 3.0  # TRL's vllm_importance_sampling_clip_max: of a sequence, beyond which it is left out


@dataclass(frozen=True)
class Prompt:
    """Token ids: a chat's beginning, a stretch of a book, and a chat's end."""

    task: str
    head: list[int]
    book: list[int]
    tail: list[int]

    @property
    def ids(self) -> list[int]:
        return self.head + self.book + self.tail

    def cut(self, tokens: int) -> list[int]:
        """Its last tokens, between the chat's beginning and end."""
        left = tokens - len(self.head) - len(self.tail)
        return self.head + self.book[len(self.book) - max(0, left) :] + self.tail


def prompts(texts: Texts, tokenizer: Any, lengths: list[int], seed: int) -> Iterator[Prompt]:
    """Without end: tasks and lengths in turn, each from a place of a held-out book by chance."""
    rng = np.random.default_rng(seed)
    mark = "BOOK"
    chat = [{"role": "user", "content": mark + REQUEST}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ends = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in whole.split(mark)]
    for index in range(10**9):
        task = TASKS[index % len(TASKS)]
        head, tail = ends if task == "summary" else ([], [])
        size = lengths[index // len(TASKS) % len(lengths)] - len(head) - len(tail)
        books = [book for book in texts.books["test"] if len(book) >= size]
        book = books[rng.integers(len(books))]
        start = int(rng.integers(len(book) - size + 1))
        yield Prompt(task, head, book[start : start + size].tolist(), tail)


def read(model: Any, ids: list[int], places: Tensor) -> tuple[DynamicCache, Tensor]:
    """Keys and values of a prompt's ``ids`` at ``places [K]``, and the last logits ``[V]``."""
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),  # gaps begin no document
        position_ids=places[None],
        past_key_values=cache,
        logits_to_keep=1,
    )
    return cache, output.logits[0, -1]


def go_on(model: Any, cache: DynamicCache, ids: Tensor, start: int) -> Tensor:
    """Logits ``[G, C, V]`` behind ``ids [G, C]``, whose first has place ``start``."""
    held = cache.get_seq_length()
    return model(
        input_ids=ids,
        attention_mask=torch.ones(len(ids), held + ids.shape[1], dtype=torch.long),
        position_ids=(start + torch.arange(ids.shape[1]))[None].expand(len(ids), -1),
        past_key_values=cache,
    ).logits


def for_group(cache: DynamicCache, group: int) -> DynamicCache:
    """A copy for so many completions."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(group)
    return cache


def sample(
    model: Any, prompt: tuple[DynamicCache, Tensor], start: int, args: Any, random: torch.Generator
) -> list[list[int]]:
    """Completions at temperature 1, each up to its end-of-text token or ``args.completion``."""
    cache, logits = for_group(prompt[0], args.group), prompt[1].expand(args.group, -1)
    ids = torch.empty(args.group, 0, dtype=torch.long)
    for step in range(args.completion):
        token = torch.multinomial(logits.float().softmax(-1), 1, generator=random)
        ids = torch.cat([ids, token], 1)
        logits = go_on(model, cache, token, start + step)[:, -1]
    end = model.config.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


def log_probabilities(
    model: Any, ids: list[int], places: Tensor, start: int, completions: Tensor
) -> Tensor:
    """Of every token at every place of ``completions [G, C]``: ``[G, C, V]`` fp32.

    Args:
        ids: Of the prompt's tokens that are read.
        places: Their positions, ``[K]``.
        start: Position of the first token of a completion.
    """
    cache, first = read(model, ids, places)
    rest = go_on(model, for_group(cache, len(completions)), completions[:, :-1], start)
    first = first.expand(len(completions), 1, -1)
    return torch.cat([first, rest], 1).float().log_softmax(-1)


def kept_places(
    config: LeMoConfig, prompt: list[int], completions: list[list[int]], by_prompt: bool
) -> Tensor:
    """Positions of the prompt that a group keeps, ``[K]``: a block's best rank in the group counts.

    Of two completions that is what LeMo keeps of a pair (`batch/pairs.py`).

    Args:
        by_prompt: The end of the prompt asks, not the completions, which decide the number alone.
    """
    passes = _pass(config, prompt, completions)
    assert isinstance(config.retention, float)
    left = min(row.num_blocks(config.retention) - row.label_blocks for row in passes.rows)
    of_prompt = (passes.real & ~passes.label_blocks).all(0, keepdim=True)
    # Blocks of every row: its first and, of the pass that asks by the prompt, those at its end.
    required = passes.required[:1]
    if by_prompt:
        passes = _pass(config, prompt[: len(prompt) - ASKING], [prompt[-ASKING:]])
    scores = rank(_inputs(passes))[:, : passes.num_blocks].float()
    scores = nn.functional.pad(scores, (0, of_prompt.shape[1] - scores.shape[1]))
    place = ranks(scores.masked_fill(~of_prompt, -torch.inf)).amin(0, keepdim=True)
    budget = left + int((required & ~of_prompt).sum())
    blocks = keep_blocks(-place.float(), torch.ones_like(required), required, budget)
    tokens = blocks.repeat_interleave(config.block_size, 1)[0, : len(prompt)]
    return tokens.nonzero().squeeze(1)


def _pass(config: LeMoConfig, prompt: list[int], completions: list[list[int]]) -> SparsePass:
    """The pass over a group, whose rows share the seeds of the first, as those of pairs do."""
    rows = [torch.tensor(prompt + completion) for completion in completions]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    targets = ids.roll(-1, 1).masked_fill(mask.roll(-1, 1) == 0, IGNORE_INDEX)
    targets[:, -1] = IGNORE_INDEX
    targets[:, : len(prompt) - 1] = IGNORE_INDEX
    shape = (ids.shape[0], ids.shape[1])
    found = SparsePass(
        config, shape, ids.device, input_ids=ids, attention_mask=mask, targets=targets
    )
    found.keys = found.keys[:1].expand(len(rows))
    return found


def _inputs(passes: SparsePass) -> Any:
    """What policies of tokens alone look at."""
    return SimpleNamespace(
        sparse_pass=passes, layer_index=0, sublayer="attention", x=passes.input_ids
    )


def lemos_own(model: Any, config: LeMoConfig, prompt: list[int], pair: list[list[int]]) -> Tensor:
    """Log-probabilities of the tokens of two completions of one length, by LeMo's pass."""
    ids = torch.tensor([prompt + completion for completion in pair])
    labels = ids.clone()
    labels[:, : len(prompt)] = IGNORE_INDEX
    lemo = apply_lemo(model, config)
    lemo.passes.pairs = PairSets()
    try:
        logits = model.train()(input_ids=ids, labels=labels).logits[:, len(prompt) - 1 : -1]
    finally:
        remove_lemo(model.eval())
    return logits.float().log_softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0]


def difference_from_lemo(model: Any, prompt: list[int], completions: list[list[int]]) -> float:
    """The largest of a token's log-probabilities, over ways and retentions that LeMo has."""
    length = min(map(len, completions[:2]))
    pair = [completion[:length] for completion in completions[:2]]
    ids = torch.tensor(pair)
    found = []
    for policy in ("auto", "recent"):
        config = LeMoConfig(retention=RETENTIONS[1], policy=policy)
        places = kept_places(config, prompt, pair, by_prompt=False)
        kept = torch.tensor(prompt)[places].tolist()
        ours = log_probabilities(model, kept, places, len(prompt), ids)
        ours = ours.gather(2, ids[..., None])[..., 0]
        found.append(float((ours - lemos_own(model, config, prompt, pair)).abs().max()))
    return max(found)


@dataclass
class Found:
    """What one way made of the completions: a list a prompt, or a number a token or sequence."""

    log_ratios: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)  # of each prompt
    sums: list[float] = field(default_factory=list)
    effective: list[float] = field(default_factory=list)  # of each prompt, share of its samples

    def add(self, log_ratios: Tensor, divergences: Tensor, real: Tensor) -> None:
        """A prompt's: of what was sampled, ``[G, C]`` each; ``real`` tells what is no padding."""
        chosen = log_ratios.double() * real
        self.log_ratios += chosen[real].tolist()
        self.divergences += divergences[real].tolist()
        self.outside.append(float((chosen[real].exp() - 1).abs().gt(CLIP).double().mean()))
        self.sums += chosen.sum(1).tolist()
        weights = chosen.sum(1).softmax(0)
        self.effective.append(float(1 / weights.square().sum() / len(weights)))

    def row(self) -> dict[str, float | int]:
        """The figures."""
        logs, sums = np.array(self.log_ratios), np.array(self.sums)
        ratios = np.exp(logs)
        low, high = np.percentile(logs, [1, 99])
        figures = {
            "outside": np.mean(np.abs(ratios - 1) > CLIP),
            "above": np.mean(ratios > 1 + CLIP),
            "below": np.mean(ratios < 1 - CLIP),
            "outside_least": min(self.outside),
            "outside_most": max(self.outside),
            "log_ratio_mean": logs.mean(),
            "log_ratio_std": logs.std(),
            "log_ratio_p1": low,
            "log_ratio_p99": high,
            "kl": np.mean(self.divergences),
            "kl_of_samples": np.mean(ratios - 1 - logs),
            "sequence_mean": sums.mean(),
            "sequence_std": sums.std(),
            "sequence_beyond": np.mean(np.abs(sums) > np.log(MOST)),
            "effective": np.mean(self.effective),
        }
        counts = {"prompts": len(self.outside), "sequences": len(sums), "tokens": len(logs)}
        return {**counts, **{name: round(float(value), 4) for name, value in figures.items()}}


def ways_of(prompt: Prompt, completions: list[list[int]]) -> Iterator[tuple[str, float, list, Any]]:
    """Way, retention, and the tokens of the prompt that are read with their places."""
    ids = torch.tensor(prompt.ids)
    yield ROUNDED, 1.0, prompt.ids, torch.arange(len(ids))
    for retention in RETENTIONS:
        for way in WAYS[:-1]:
            policy = "recent" if way == "recent" else "auto"
            config = LeMoConfig(retention=retention, policy=policy)
            places = kept_places(config, prompt.ids, completions, way == WAYS[1])
            yield way, retention, ids[places].tolist(), places
        shorter = prompt.cut(len(places))
        yield WAYS[-1], retention, shorter, torch.arange(len(shorter))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="directory made by make_base.py")
    add("--texts", type=Path, required=True, help="folder made by prepare.py")
    add("--output", type=Path, required=True, help="a JSON file")
    add("--lengths", type=int, nargs="+", default=[2048, 4096], help="of prompts, tokens")
    add("--prompts", type=int, default=8)
    add("--group", type=int, default=8, help="completions of a prompt")
    add("--completion", type=int, default=64, help="tokens of a completion, at most")
    add("--seconds", type=float, default=1e9, help="after which no prompt is begun")
    add("--seed", type=int, default=0)
    add("--commit", default="unknown")
    args = parser.parse_args()
    began, random = time.monotonic(), torch.Generator().manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    rounded = copy.deepcopy(model).bfloat16()
    texts = Texts.load(args.texts)
    header: dict[str, Any] = environment(torch.device("cpu"), ("torch", "transformers"))
    header |= {"commit": args.commit, "model": args.base.name, "texts": texts.origin["test"]}
    header |= {name: getattr(args, name) for name in ("lengths", "group", "completion", "seed")}
    header["commands"] = [command_line("quality/grpo_ratios.py", sys.argv[1:])]
    found: dict[tuple[str, str, float], Found] = {}
    source = prompts(texts, tokenizer, args.lengths, args.seed)
    for index in range(args.prompts):
        if time.monotonic() - began > args.seconds:
            break
        prompt = next(source)
        size = len(prompt.ids)
        everything = torch.arange(size)
        completions = sample(model, read(model, prompt.ids, everything), size, args, random)
        if index == 0:
            header["from_lemo"] = difference_from_lemo(model, prompt.ids, completions)
        ids = nn.utils.rnn.pad_sequence(list(map(torch.tensor, completions)), batch_first=True)
        lengths = list(map(len, completions))
        real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        dense = log_probabilities(model, prompt.ids, everything, size, ids)
        for way, retention, kept, places in ways_of(prompt, completions):
            start = len(kept) if way == "cut" else size
            reads = rounded if way == ROUNDED else model
            learner = log_probabilities(reads, kept, places, start, ids)
            ratios = (learner - dense).gather(2, ids[..., None])[..., 0]
            divergences = (dense.exp() * (dense - learner)).sum(-1)
            for of in ("all", prompt.task, f"{size} tokens"):
                each = found.setdefault((of, way, retention), Found())
                each.add(ratios, divergences, real)
        rows = [
            {"of": of, "way": way, "retention": retention, **each.row()}
            for (of, way, retention), each in sorted(found.items())
        ]
        save(args.output, header, rows)
        print(f"{index + 1} prompts, {time.monotonic() - began:.0f} s", flush=True)
    print(json.dumps(header))
    for row in rows:
        if row["of"] == "all":
            print(json.dumps(row))


if __name__ == "__main__":
    main()
