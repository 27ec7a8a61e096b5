"""The words behind ``policy="overlap"``: what the best blocks of a text share with its question."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lemo_hf.core.sparse_pass import SparsePass

# Words that stand in more than an eighth of all blocks explain little: 2.1 nats.
LEAST_NATS = math.log(8)
MOST_WORDS = 5  # that are told of a block


@dataclass(frozen=True)
class SharedWords:
    """A stretch of a block's tokens whose pairs of neighbours the asking tokens have too.

    Attributes:
        text: Text of the tokens.
        blocks: Number of blocks of the text, without asking ones, that hold all of it.
        nats: log(blocks of the row / blocks that hold its rarest token or pair).
    """

    text: str
    blocks: int
    nats: float


@dataclass(frozen=True)
class SharedBlock:
    """A block of the text that ``overlap`` ranks high.

    Attributes:
        block: Index of the block, from 0.
        first: Index of its first token.
        last: Index of its last token.
        score: Score that the policy gives it.
        words: Words that it shares with the asking tokens, the rarest first; none if the block was
            found otherwise: beside an asking block, or through the words of a block that was found
            before.
        text: Text of the block.
    """

    block: int
    first: int
    last: int
    score: float
    words: list[SharedWords]
    text: str


def shared_words(
    sparse_pass: SparsePass, scores: Tensor, decode: Callable[[Sequence[int]], str], most: int = 5
) -> list[SharedBlock]:
    """The blocks of a row that ``overlap`` ranks highest, best first, and the words that they
    share.

    Asking blocks and blocks with a score of 0 are left out.

    Args:
        sparse_pass: Sparse pass over one row that is one document, without padding.
        scores: Scores of the policy, ``[1, N]``.
        decode: Function from token ids to text.
        most: Greatest number of blocks to return.

    Raises:
        ValueError: The pass has several rows, or no token ids.
    """
    if sparse_pass.input_ids is None or sparse_pass.batch != 1:
        raise ValueError(f"the pass must have one row of token ids, got {sparse_pass.batch} rows.")
    ids: list[int] = sparse_pass.input_ids[0].tolist()
    size = sparse_pass.config.block_size
    words = _Words(ids, sparse_pass.asking_tokens[0].tolist(), size)
    values: list[float] = scores[0].tolist()
    order = [i for i in range(sparse_pass.num_blocks) if values[i] > 0 and i not in words.asks]
    found = []
    for block in sorted(order, key=lambda i: -values[i])[:most]:
        first, last = block * size, min((block + 1) * size, len(ids)) - 1
        shared: dict[str, SharedWords] = {}
        runs = words.runs(first, last + 1)
        for start, end in [_whole(ids, *run, decode) for run in runs]:
            text = _line(decode(ids[start:end]))
            if end == start or not any(map(str.isalnum, text)):
                continue
            told = SharedWords(text, words.holders(start, end), words.nats(start, end))
            if told.nats >= LEAST_NATS:
                shared.setdefault(text, told)
        rarest = sorted(shared.values(), key=lambda told: -told.nats)[:MOST_WORDS]
        text = _line(decode(ids[first : last + 1]))
        found.append(SharedBlock(block, first, last, values[block], rarest, text))
    return found


class _Words:
    """Tokens and pairs of neighbours, with the blocks that hold each and whether it is asked for.

    Attributes:
        asks: Blocks with asking tokens.
    """

    def __init__(self, ids: list[int], asking: list[bool], size: int):
        self._ids = ids
        self._held: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self._wanted: set[tuple[int, ...]] = set()
        for place in range(len(ids)):
            for end in (place + 1, place + 2):
                word = tuple(ids[place:end])
                self._held[word].add(place // size)
                if all(asking[place:end]):
                    self._wanted.add(word)
        self._blocks = -(-len(ids) // size)
        self.asks = {place // size for place, asked in enumerate(asking) if asked}

    def runs(self, first: int, end: int) -> list[tuple[int, int]]:
        """Longest stretches within a block whose pairs are all asked for, of at least one token."""
        runs: list[tuple[int, int]] = []
        for place in range(first, end):
            if (self._ids[place],) not in self._wanted:
                continue
            follows = runs and runs[-1][1] == place
            if follows and tuple(self._ids[place - 1 : place + 1]) in self._wanted:
                runs[-1] = (runs[-1][0], place + 1)
            else:
                runs.append((place, place + 1))
        return runs

    def holders(self, start: int, end: int) -> int:
        """Blocks, without asking ones, that hold every token and pair of a stretch."""
        return len(set.intersection(*self._words(start, end)) - self.asks)

    def nats(self, start: int, end: int) -> float:
        """Rarity in nats of the rarest token or pair of a stretch."""
        return max(math.log(self._blocks / len(held)) for held in self._words(start, end))

    def _words(self, start: int, end: int) -> list[set[int]]:
        places = [(i, i + 1) for i in range(start, end)] + [
            (i, i + 2) for i in range(start, end - 1)
        ]
        return [self._held[tuple(self._ids[first:last])] for first, last in places]


def _whole(
    ids: list[int], start: int, end: int, decode: Callable[[Sequence[int]], str]
) -> tuple[int, int]:
    """A stretch without parts of words at its ends, which would mean nothing to a reader."""

    def parted(place: int) -> bool:
        """Whether a word continues from the token before ``place`` into the one there."""
        if not 0 < place < len(ids):
            return False
        after = decode([ids[place]]).strip()
        before = decode(ids[place - 1 : place + 1]).removesuffix(after)
        return before[-1:].isalnum() and after[:1].isalnum()

    while start < end and parted(start):
        start += 1
    while start < end and parted(end):
        end -= 1
    return start, end


def _line(text: str) -> str:
    return " ".join(text.split())
