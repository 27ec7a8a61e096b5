"""Which blocks share rare words with the asking tokens: without a model, by one sort of all words.

Pure functions of their inputs. Sums are of integers, so they depend on no order: the same row gives
the same scores on any device, in any batch, in a recomputation and after a resume.
"""

import torch
from torch import Tensor

from lemo_hf.predictors.training_free import Places, mix32

# A word is one token or two neighbours. A word weighs log(blocks / blocks that hold it) to this
# power: what stands everywhere hardly counts, however often.
LENGTHS, POWER = (1, 2), 3
# Words that are found within so many tokens of each other add up.
NEAR = 8
# How often what was found asks in turn.
HOPS = 4
_UNIT = 2**16  # of a weight
_BITS = 21  # of a block's number; a word's has 32


def overlap_scores(
    input_ids: Tensor,
    asking: Tensor,
    block_size: int,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    hops: int = HOPS,
) -> Tensor:
    """How much rare wording a block shares, in one place, with the asking tokens.

    A word (one token, or two neighbours) weighs ``log(blocks / blocks that hold it) ** POWER``, and
    counts once in a block. A place finds the weights of the wanted words within `NEAR` tokens of
    it; the score of a block is what its best place finds. The first hop wants the words of asking
    tokens. Each further hop also wants the words of every place, by the share that it found of the
    best place's finds, so that the links of a chain of facts are found one after the other. Asking
    blocks score above all others, and nothing is found in them.

    The host waits for nothing. Words of all lengths share each operation: for one row the time is
    that of launching kernels.

    Args:
        input_ids: ``[B, T]``.
        asking: Tokens whose words are wanted, ``[B, T]`` bool.
        block_size: Tokens a block. A word belongs to the block of its first token.
        valid: Mask of tokens, ``[B, T]`` bool, False at padding; or None.
        documents: Document ids, ``[B, T]`` ascending, or None. Words are wanted, counted and found
            within one document.
        hops: Number of hops, at least 1.

    Returns:
        Scores, ``[B, ceil(T / block_size)]`` fp32, at least 0; 0 in a row where no token asks.

    Source: design measured in ``docs/QUALITY.md``; the weights are inverse document frequencies.
    """
    row = _Row(input_ids, block_size, valid, documents)
    words = _Words(row, input_ids)
    strength = (asking if valid is None else asking & valid).double()
    asks = row.in_blocks(strength)  # nothing is to be found there, nor beside it because of it
    wanted = words.most(strength)
    found = row.near(words.weigh(wanted), ~asks)
    for _ in range(hops - 1):
        wanted = torch.maximum(wanted, words.most(row.share(found)))
        found = row.near(words.weigh(wanted), ~asks)
    scores = row.by_block(found).amax(2)
    best = scores.amax(1, keepdim=True) + _UNIT
    return (torch.where(row.by_block(asks).any(2), best, scores).double() / _UNIT).float()


class _Row:
    """Places of a batch: blocks, and the documents that bound which tokens are near.

    Args:
        input_ids: ``[B, T]``.
        block_size: Tokens a block.
        valid: ``[B, T]`` bool, or None.
        documents: ``[B, T]`` ascending ids, or None.
    """

    def __init__(
        self, input_ids: Tensor, block_size: int, valid: Tensor | None, documents: Tensor | None
    ):
        self.shape, self.size = input_ids.shape, block_size
        self.valid, self.documents = valid, documents
        place = torch.arange(self.shape[1], device=input_ids.device).expand(self.shape)
        self.block = place // block_size
        real = torch.ones_like(place, dtype=torch.bool) if valid is None else valid
        places = Places.of(real, documents)  # of tokens within their documents
        self.number = places.document
        self.blocks = -(-places.size // block_size)  # of each token's document
        first, end = place * 0, place * 0 + self.shape[1]
        if documents is not None:
            first = place - places.place
            end = first + places.size
        self._from = torch.maximum(place - NEAR, first)
        self._to = torch.minimum(place + NEAR + 1, end)

    def near(self, weights: Tensor, where: Tensor) -> Tensor:
        """What places find, ``[B, T]`` int64, from the ``weights`` of words that begin at tokens,
        likewise.

        Words and places count ``where [B, T]`` bool is True.
        """
        sums = torch.nn.functional.pad((weights * where).cumsum(1), (1, 0))
        found = (sums.gather(1, self._to) - sums.gather(1, self._from)) * where
        return found if self.valid is None else found * self.valid

    def share(self, found: Tensor) -> Tensor:
        """``found [B, T]`` as a share of the most in its document, ``[B, T]`` fp64."""
        most = torch.zeros_like(found).scatter_reduce_(1, self.number, found, "amax")
        return found.double() / most.gather(1, self.number).clamp_min(1)

    def by_block(self, x: Tensor) -> Tensor:
        """``[B, T]`` as ``[B, N, block_size]``, zeros behind the end."""
        padding = -self.shape[1] % self.size
        return torch.nn.functional.pad(x, (0, padding)).unflatten(1, (-1, self.size))

    def in_blocks(self, strength: Tensor) -> Tensor:
        """Tokens of blocks that have any ``strength [B, T]``, ``[B, T]`` bool."""
        blocks = self.by_block(strength).any(2)
        return blocks.repeat_interleave(self.size, 1)[:, : self.shape[1]]


class _Words:
    """The words of a batch, by their `LENGTHS` (L), sorted by word and then by block.

    A word that holds padding or ends in another document does not count: it sorts last and weighs
    nothing.
    """

    def __init__(self, row: _Row, ids: Tensor):
        real = torch.ones_like(ids, dtype=torch.bool) if row.valid is None else row.valid
        key, whole = ids.long() * 0, real
        keys, wholes = [], []
        for part in range(max(LENGTHS)):
            key = mix32(key * 31 + _shifted(ids.long(), part) + 1)
            whole = whole & _shifted(real, part)
            if row.documents is not None:
                whole = whole & (_shifted(row.documents, part, -1) == row.documents)
            if part + 1 in LENGTHS:
                keys.append(key)
                wholes.append(whole)
        key, whole = mix32(torch.stack(keys) * 31 + row.number), torch.stack(wholes)
        both = torch.where(whole, (key << _BITS) + row.block, 2**62)
        both, self._order = both.sort(dim=2, stable=True)  # a block's first place stays first
        self._whole = whole.gather(2, self._order)
        before = both.new_full((*both.shape[:2], 1), -1)
        first = (both.diff(dim=2, prepend=before) != 0) & self._whole
        self._word = ((both >> _BITS).diff(dim=2, prepend=before) != 0).cumsum(2) - 1
        holders = torch.zeros_like(both).scatter_add_(2, self._word, first.long())
        holders = holders.gather(2, self._word).clamp_min(1)
        rarity = row.blocks.expand_as(both).gather(2, self._order).double() / holders
        self._weight = rarity.clamp_min(1).log() ** POWER * first * _UNIT

    def most(self, strength: Tensor) -> Tensor:
        """How much each word is wanted, by the strongest of its places, ``[L, B, T]``, sorted.

        A place of two tokens is as strong as the weaker of them; ``strength [B, T]`` in [0, 1].
        """
        weakest = [strength]
        for part in range(1, max(LENGTHS)):
            weakest.append(torch.minimum(weakest[-1], _shifted(strength, part)))
        each = torch.stack([weakest[length - 1] for length in LENGTHS])
        each = each.gather(2, self._order) * self._whole
        best = torch.zeros_like(each).scatter_reduce_(2, self._word, each, "amax")
        return best.gather(2, self._word)

    def weigh(self, wanted: Tensor) -> Tensor:
        """Weight of the words that begin at each token, ``[B, T]`` int64, by ``wanted``, sorted.

        A word counts only at its first place in a block.
        """
        weights = (self._weight * wanted).round().long()
        return torch.empty_like(weights).scatter_(2, self._order, weights).sum(0)


def _shifted(x: Tensor, count: int, value: int = 0) -> Tensor:
    """Values ``count`` places to the right, ``[B, T]``; ``value`` behind the end."""
    return torch.nn.functional.pad(x[:, count:], (0, count), value=value)
