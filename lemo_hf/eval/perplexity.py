"""Perplexity of a causal LM on token ids: sliding windows, or LongLoRA's protocol."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather
from torch import Tensor, nn
from tqdm.auto import tqdm

from lemo_hf.eval.token_losses import TokenLosses
from lemo_hf.modes import evaluating
from lemo_hf.patch import transformers_model

logger = logging.getLogger(__name__)

PROTOCOLS = ("sliding", "longlora")
LONGLORA_STRIDE = 256


@dataclass(frozen=True)
class Perplexity:
    """Perplexity, with all settings that a comparable figure must share.

    Attributes:
        perplexity: ``exp(loss)``.
        loss: Nats per scored token.
        tokens: Number of scored tokens; ``"longlora"`` scores most tokens in several windows.
        windows: Number of windows that were run.
        documents: Number of documents with at least one window.
        skipped_documents: Number of documents that are too short for a window.
        protocol: Protocol, ``"sliding"`` or ``"longlora"``.
        max_length: Number of tokens of a window.
        stride: Number of tokens between the starts of two windows.
        by_position: Losses by the number of context tokens, which is a token's place in the window.
            One entry for each range in which tokens were scored: ``first`` and ``last`` number of
            context tokens, ``tokens``, ``loss`` (nats a token) and ``perplexity``.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    documents: int
    skipped_documents: int
    protocol: str
    max_length: int
    stride: int
    by_position: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """All figures, as a dictionary for JSON."""
        return dataclasses.asdict(self)


def perplexity(
    model: nn.Module,
    documents: Iterable[Sequence[int]],
    *,
    max_length: int,
    stride: int | None = None,
    protocol: str = "sliding",
    batch_size: int = 1,
    buckets: int = 8,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of ``model`` on documents that may be longer than its context.

    A document is cut into windows of ``max_length`` tokens, one every ``stride`` tokens. A window
    does not see the text before it, and no window spans two documents.

    ``"sliding"`` scores each token once, in the first window that has it. So all but the first
    ``max_length`` tokens of a document have at least ``max_length - stride`` tokens of context. The
    last window may be shorter. This is the strided evaluation of transformers' documentation,
    without the approximation there: the result is ``exp(sum of losses / scored tokens)``, not a
    mean of the windows' means. The first token of a document is not scored, nor, with
    ``stride=max_length``, that of a window: no token is before it.

    ``"longlora"`` scores every window whole, also tokens with little context, and leaves out what
    does not fill a window. Its figures are higher than those of ``"sliding"``; compare them only
    with each other. It is the protocol of LongLoRA's eval.py (arXiv 2309.12307) for one stream of
    tokens a document, except that eval.py leaves out the last window or two of the stream, gives a
    last batch that is not full the weight of a full one, and takes 2.71828 for e.

    Batches hold windows of one length, so nothing is padded. Passes are dense and without KV cache,
    also after `apply_lemo`. Several processes (``accelerate launch``) share the batches if all get
    the same documents, and all return the same result; FSDP2 may shard the model over them.

    Args:
        model: Causal LM or a PEFT model around one, on its device; unchanged afterwards.
        documents: Token ids of each document: lists, integer arrays (memory-mapped ones are read
            window by window) or tensors. No BOS or other token is added.
        max_length: Number of tokens of a window.
        stride: Number of tokens between the starts of two windows. None: half of ``max_length``;
            with ``"longlora"`` 256, or ``max_length`` if that is less.
        protocol: Protocol, ``"sliding"`` or ``"longlora"``.
        batch_size: Number of windows in a pass on each process.
        buckets: Number of ranges of context in ``by_position``.
        progress: Whether a progress bar is shown, on the main process.

    Returns:
        The figures. Losses are fp32, or the model's own dtype if wider; their sums are fp64.

    Raises:
        ValueError: A setting is out of range, no document is long enough, or a document is not a
            sequence of ids of the model's vocabulary.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}.")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
    if stride is None:
        stride = max_length // 2 if protocol == "sliding" else min(LONGLORA_STRIDE, max_length)
    if not 1 <= stride <= max_length:
        raise ValueError(
            f"stride must be from 1 to max_length={max_length}, so that every token is scored, got "
            f"{stride}."
        )
    for name, value in (("batch_size", batch_size), ("buckets", buckets)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    # A wrapper for training would wait for the other processes, or trace a pass without its hooks.
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    state = PartialState()
    config = transformers_model(model).config.get_text_config()
    if state.is_main_process:
        _warn_of_positions(config, max_length)
    windows = _Windows(documents, config.vocab_size, max_length, stride, protocol)
    sums = np.zeros((2, max_length))  # losses, and how many, by place in the window
    with (
        evaluating(model),
        tqdm(
            total=windows.count(),
            desc="perplexity",
            unit="window",
            disable=not (progress and state.is_main_process),
        ) as bar,
    ):
        token_losses = TokenLosses(model)
        for batch, is_mine, total in _shared(_batches(windows, batch_size), state):
            losses, places = _run(token_losses, batch)
            if is_mine:
                sums[0] += np.bincount(places, losses, max_length)
                sums[1] += np.bincount(places, minlength=max_length)
            bar.update(total)
            if not bar.disable:
                so_far = _exp(sums[0].sum() / sums[1].sum())
                bar.set_postfix(perplexity=f"{so_far:.4g}", refresh=False)
    windows.check()
    if state.num_processes > 1:
        shares = gather(torch.from_numpy(sums)[None].to(state.device))
        sums = shares.sum(0).cpu().numpy()
    loss = float(sums[0].sum() / sums[1].sum())
    return Perplexity(
        perplexity=_exp(loss),
        loss=loss,
        tokens=int(sums[1].sum()),
        windows=windows.windows,
        documents=windows.documents,
        skipped_documents=windows.skipped,
        protocol=protocol,
        max_length=max_length,
        stride=stride,
        by_position=_by_position(sums, buckets),
    )


@dataclass(frozen=True)
class _Window:
    """Tokens that are run together, of which those from ``first`` on are scored."""

    ids: np.ndarray
    first: int


class _Windows:
    """The windows of all documents in order, with counts once they have been iterated."""

    def __init__(
        self,
        documents: Iterable[Sequence[int]],
        vocab_size: int,
        max_length: int,
        stride: int,
        protocol: str,
    ):
        self.source, self.vocab_size = documents, vocab_size
        self.max_length, self.stride, self.protocol = max_length, stride, protocol
        self.windows = self.documents = self.skipped = self.longest = 0

    def __iter__(self) -> Iterator[_Window]:
        for number, document in enumerate(self.source):
            row = hasattr(document, "__len__") and not isinstance(document, Mapping)
            if not row or getattr(document, "ndim", 1) != 1:
                raise ValueError(
                    f"document {number} must be a sequence of token ids, got "
                    f"{type(document).__name__} {str(document)[:60]!r}. Write [ids] for a single "
                    "document."
                )
            before = self.windows
            for start, stop, first in self._bounds(len(document)):
                self.windows += 1
                yield _Window(self._ids(document, number, start, stop), first)
            self.documents += self.windows > before
            self.skipped += self.windows == before
            self.longest = max(self.longest, len(document))

    def count(self) -> int | None:
        """Number of windows; None if documents cannot be read in advance."""
        if not isinstance(self.source, Sequence):
            return None
        sized = (document for document in self.source if hasattr(document, "__len__"))
        return sum(1 for document in sized for _ in self._bounds(len(document)))

    def check(self) -> None:
        """Raises ValueError if there was no window; logs how many documents had none."""
        if not self.windows:
            least = 2 if self.protocol == "sliding" else self.max_length
            raise ValueError(
                f"no document has {least} tokens: the longest of {self.skipped} has "
                f"{self.longest}. Use a smaller max_length, protocol='sliding' or longer documents."
            )
        if self.skipped and PartialState().is_main_process:
            logger.warning(
                "%d of %d documents are shorter than a window and were left out.",
                self.skipped,
                self.skipped + self.documents,
            )

    def _bounds(self, length: int) -> Iterator[tuple[int, int, int]]:
        """The start, the end and the first scored place of each window of a document."""
        if self.protocol == "longlora":
            for start in range(0, length - self.max_length + 1, self.stride):
                yield start, start + self.max_length, 1
            return
        scored = 0
        for start in range(0, length, self.stride):
            stop = min(start + self.max_length, length)
            if stop - start > 1:
                yield start, stop, max(1, scored - start)
            if stop == length:
                return
            scored = stop

    def _ids(self, document: Sequence[int], number: int, start: int, stop: int) -> np.ndarray:
        part = document[start:stop]
        ids = part.cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise ValueError(
                f"document {number} must be a sequence of token ids, which are integers; it has "
                f"{str(ids.flat[0])[:60]!r}. Tokenise texts first."
            )
        wrong = (ids < 0) | (ids >= self.vocab_size)
        if wrong.any():
            place = int(wrong.argmax())
            raise ValueError(
                f"document {number} has the token {ids[place]} at {start + place}, the model's "
                f"vocabulary has {self.vocab_size}: tokenise it with the model's tokenizer."
            )
        return ids.astype(np.int64)


def _batches(windows: Iterable[_Window], batch_size: int) -> Iterator[list[_Window]]:
    """Batches of windows of one length, without padding, on which a rotary embedding may depend."""
    waiting: dict[int, list[_Window]] = {}
    for window in windows:
        batch = waiting.setdefault(len(window.ids), [])
        batch.append(window)
        if len(batch) == batch_size:
            yield waiting.pop(len(window.ids))
    yield from waiting.values()


def _shared(
    batches: Iterable[list[_Window]], state: PartialState
) -> Iterator[tuple[list[_Window], bool, int]]:
    """For each turn: this process's batch, whether it counts, and the windows of all processes.

    If there are too few batches for the last turn, processes without one run another's: with
    sharded weights a pass needs all processes.
    """
    batches = iter(batches)
    while turn := list(islice(batches, state.num_processes)):
        mine = min(state.process_index, len(turn) - 1)
        yield turn[mine], mine == state.process_index, sum(map(len, turn))


def _run(token_losses: TokenLosses, batch: list[_Window]) -> tuple[np.ndarray, np.ndarray]:
    """Losses ``[N]`` fp64 of the batch's scored tokens, and their places in the window."""
    ids = torch.from_numpy(np.stack([window.ids for window in batch])).to(token_losses.device)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = torch.tensor([window.first for window in batch], device=ids.device)
    scored = places >= first[:, None]
    losses: Tensor = token_losses(ids, scored)
    return losses.cpu().double().numpy(), places[scored].cpu().numpy()


def _by_position(sums: np.ndarray, buckets: int) -> list[dict[str, float]]:
    """Losses by ranges of equal width; the first has no context 0, which predicts nothing."""
    length = sums.shape[1]
    edges = sorted({round(i * length / buckets) for i in range(buckets + 1)})
    rows = []
    for start, stop in pairwise(edges):
        loss, tokens = sums[:, start:stop].sum(1).tolist()
        if tokens:
            rows.append(
                {
                    "first": max(start, 1),
                    "last": stop - 1,
                    "tokens": int(tokens),
                    "loss": loss / tokens,
                    "perplexity": _exp(loss / tokens),
                }
            )
    return rows


def _exp(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)  # which raises where fp64 ends


def _warn_of_positions(config: Any, max_length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or longest
    longest = max(longest, int(original * (rope.get("factor") or 1)))
    if max_length > longest:
        logger.warning(
            "max_length=%d is beyond the model's %d positions: the figures show how it "
            "extrapolates. Scale its RoPE, or use a smaller max_length.",
            max_length,
            longest,
        )
