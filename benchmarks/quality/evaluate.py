"""Dense evaluation of a model: answers under teacher forcing, perplexity whole and by position.

Key tokens are those whose prediction needs far context, after LongPPL (arXiv:2410.23771): with the
whole row before it the token is at least `GAIN` nats more likely than with the last `SHORT` / 2 to
`SHORT` tokens, and its log-likelihood is above `LIKELY`. The judge is the base model with YaRN and
without the adapter, so that they are the same tokens for every arm.
"""

import math
from collections import defaultdict
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.quality.feed import Feed
from benchmarks.quality.model import precision
from benchmarks.quality.row import Row, RowSet
from lemo_hf.patch import transformers_model

GAIN, LIKELY, SHORT = 2.0, -2.0, 4096  # nats, nats, tokens
BIN = 4096  # tokens of a position's bin
AT_ONCE = 32768  # tokens of a forward
SLICE = 4096  # tokens whose logits exist at a time
TEST_SEED = 77


def lengths(tokens: int) -> list[int]:
    """Of the rows that are asked, for a model made for ``tokens``."""
    return [tokens // 4, tokens // 2, tokens]


def _hidden(model: PeftModel, ids: Tensor) -> Tensor:
    """``[B, T]`` to what the head reads, ``[B, T, H]``."""
    return transformers_model(model).get_decoder()(input_ids=ids).last_hidden_state


def _logits(model: PeftModel, hidden: Tensor) -> Tensor:
    return transformers_model(model).get_output_embeddings()(hidden).float()


def token_nats(model: PeftModel, ids: Tensor) -> Tensor:
    """Nats of every token but the first: ``[B, T]`` to ``[B, T - 1]`` fp32."""
    hidden = _hidden(model, ids)[:, :-1]
    parts = []
    for start in range(0, hidden.shape[1], SLICE):
        part = slice(start, start + SLICE)
        for row, targets in zip(hidden[:, part], ids[:, 1:][:, part], strict=True):
            logits = _logits(model, row)
            parts.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    count = len(ids)
    return torch.stack([torch.cat(parts[row::count]) for row in range(count)])


def ask(model: PeftModel, rows: list[Row], device: torch.device) -> dict[str, dict[str, float]]:
    """By kind of question: share answered ``exact``, ``nats`` a token, and ``count``."""
    found: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    size = max(1, AT_ONCE // len(rows[0].ids))
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        ids = torch.from_numpy(np.stack([row.ids for row in some]).astype(np.int64)).to(device)
        hidden = _hidden(model, ids)
        spans = [(i, a, b) for i, row in enumerate(some) for a, b in row.answers.tolist()]
        row_of = torch.tensor([i for i, a, b in spans for _ in range(a, b)], device=device)
        place = torch.tensor([p for _, a, b in spans for p in range(a, b)], device=device)
        logits = _logits(model, hidden[row_of, place - 1])
        targets = ids[row_of, place]
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        right = (logits.argmax(-1) == targets).tolist()
        at, kinds = 0, [kind for row in some for kind in row.kinds]
        for kind, (_, a, b) in zip(kinds, spans, strict=True):
            part = slice(at, at + b - a)
            found[kind].append((float(all(right[part])), sum(nats[part]), b - a))
            at += b - a
    return {
        kind: {
            "exact": round(sum(x[0] for x in some) / len(some), 4),
            "nats": round(sum(x[1] for x in some) / sum(x[2] for x in some), 4),
            "count": len(some),
        }
        for kind, some in found.items()
    }


class Judge:
    """What models for rows of ``tokens`` are asked, made once.

    Args:
        feed: Makes rows of the held-out books.
        tokens: The longest rows.
        rows: Of each length.
        windows: Of plain text.
        device: Where models run.
    """

    def __init__(self, feed: Feed, tokens: int, rows: int, windows: int, device: torch.device):
        self.feed, self.tokens, self.device = feed, tokens, device
        self._rows, self._asked = rows, {}
        self._windows = windows
        self._key: Tensor | None = None

    @cached_property
    def text(self) -> Tensor:
        """Plain books, ``[W, T]``."""
        windows = self.feed.texts.windows(self.tokens, self._windows)
        return torch.from_numpy(windows.astype(np.int64)).to(self.device)

    def rows(self, task: str, length: int) -> list[Row]:
        """Held-out rows of a task."""
        if (task, length) not in self._asked:
            source = self.feed.rows(RowSet(task, length, "test", TEST_SEED))
            self._asked[task, length] = list(islice(source, self._rows))
        return self._asked[task, length]

    @torch.inference_mode()
    def key_tokens(self, model: PeftModel) -> Tensor:
        """``[W, T - 1]`` bool: which of `token_nats` are of key tokens; by the bare base model."""
        if self._key is None:
            short = min(SHORT, self.tokens // 8)
            half = short // 2
            marks = []
            with model.disable_adapter(), precision(self.device):
                for window in self.text:
                    long = token_nats(model, window[None])[0]
                    parts = window.unfold(0, short, half)  # each tells its second half
                    size = max(1, AT_ONCE // short)
                    near = [
                        token_nats(model, some)[:, -half:].flatten() for some in parts.split(size)
                    ]
                    near_nats = torch.cat(near)
                    far = long[short - half - 1 :][: len(near_nats)]
                    key = torch.zeros_like(long, dtype=torch.bool)
                    is_key = (near_nats - far > GAIN) & (-far > LIKELY)
                    key[short - half - 1 :][: len(near_nats)] = is_key
                    marks.append(key)
            self._key = torch.stack(marks)
        return self._key

    @torch.inference_mode()
    def plain_text(self, model: PeftModel) -> dict:
        """Perplexity of whole windows, by position, and of key tokens."""
        key = self.key_tokens(model)
        with precision(self.device):
            nats = torch.stack([token_nats(model, window[None])[0] for window in self.text])
        size = min(BIN, self.tokens // 4)
        bins = torch.nn.functional.pad(nats, (1, 0)).unflatten(1, (-1, size))
        counts = torch.full((bins.shape[1],), size, device=bins.device)
        counts[0] -= 1  # nothing predicts the first token
        places = bins.sum(2).mean(0) / counts
        return {
            "perplexity": round(math.exp(nats.mean()), 4),
            "by_position": [round(math.exp(x), 4) for x in places.tolist()],
            "key_perplexity": round(math.exp(nats[key].mean()), 4) if key.any() else None,
            "key_tokens": int(key.sum()),
        }

    @torch.inference_mode()
    def __call__(self, model: PeftModel, task: str) -> dict:
        """All figures of a task; the model is left in evaluation mode."""
        model.eval()
        with precision(self.device):
            asked = {
                str(length): ask(model, self.rows(task, length), self.device)
                for length in lengths(self.tokens)
            }
        return {"asked": asked, **(self.plain_text(model) if task == "text" else {})}
