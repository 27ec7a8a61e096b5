"""The network that predicts which blocks the asking blocks of a row will need.

Every token has a query and a key of length 1, maps of the layer's input. A token i of an
asking block matches a block n by its best key there, ``s_in = scale * max_j q_i . k_j``, and
divides one unit among the blocks before its own by ``softmax_n(s_in)``. The shares of block m are
the mean over its tokens, weighted by ``softmax_i`` of a map of the token plus its rarity in its row
(`rarity`), since rare words say more than common ones. So each asking block shares out one unit,
and the score of a block is the sum of its shares. Before anything is learned a token looks for
similar tokens, with more weight the rarer it is.

Tokens are compared with tokens (late interaction) because means of blocks lose the words. This
costs one pass over the stream and one product of the asking tokens with all keys.

Sources: LeMo, arXiv:2501.09767, "Context-aware Pattern Prediction" (low-rank queries and keys);
ColBERT, arXiv:2004.12832 (late interaction).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from lemo_hf.predictors.asked_shares import HIDDEN

# Products of an asking token and a key that exist at a time, 256 MiB in fp32.
PAIRS = 2**26
SCALE = 16.0  # of the cosines, at the beginning
RANK = 512  # the more dimensions, the truer the cosines: see docs/LOG.md


class Projected(NamedTuple):
    """Queries, keys and weights of the tokens, by blocks, fp32."""

    keys: Tensor  # [B, N, block_size, rank]
    queries: Tensor  # [B, N, block_size, rank]
    weights: Tensor  # [B, N, block_size], logarithms
    valid: Tensor  # [B, N, block_size] bool

    @classmethod
    def join(cls, parts: list["Projected"]) -> "Projected":
        """Chunks of a sequence, in order, joined to one."""
        return cls(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))

    def weighed(self, rare: Tensor | None) -> "Projected":
        """A copy whose weights include ``rare [B, T]`` fp32, the tokens' `rarity`; with None
        unchanged."""
        if rare is None:
            return self
        blocks, size = self.weights.shape[1:]
        rare = pad(rare, (0, blocks * size - rare.shape[1]))
        weights = self.weights + rare.unflatten(1, (blocks, size))
        return Projected(self.keys, self.queries, weights, self.valid)


class BlockPredictor(nn.Module):
    """Scores of token blocks for the attention of one layer.

    Args:
        hidden_size: Hidden size H of the model.
        block_size: Tokens a block.
        rank: Size of queries and keys.
    """

    def __init__(self, hidden_size: int, block_size: int, rank: int = RANK):
        super().__init__()
        self.hidden_size, self.block_size, self.rank = hidden_size, block_size, rank
        self.query = nn.Linear(hidden_size, rank)
        self.key = nn.Linear(hidden_size, rank)
        self.weight = nn.Linear(hidden_size, 1, bias=False)
        self.scale = nn.Parameter(torch.full((1,), SCALE))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights anew, on the CPU, from ``generator`` alone.

        Queries begin equal to keys, so that a token looks for similar tokens before anything is
        learned. Their dimensions are orthogonal: cosines approximate those of the model's states.
        """
        nn.init.orthogonal_(self.key.weight, generator=generator)
        self.query.weight.data.copy_(self.key.weight)
        nn.init.zeros_(self.query.bias)
        nn.init.zeros_(self.key.bias)
        nn.init.zeros_(self.weight.weight)

    @torch.no_grad()
    def center(self, rows: Tensor) -> None:
        """Remove what all of ``rows [..., H]`` have in common from queries and keys."""
        mean = rows.flatten(0, -2).mean(0, dtype=torch.float32)
        for linear in (self.query, self.key):
            linear.bias.copy_(-linear.weight @ mean)

    def untrained(self, rows: Tensor) -> "BlockPredictor":
        """A new network of the same sizes, not trained, centred on ``rows [..., H]``."""
        new = BlockPredictor(**self.sizes)
        new.init_weights(torch.Generator().manual_seed(0))
        new.to(rows.device).center(rows)
        return new

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments that make a module of these shapes."""
        return {name: getattr(self, name) for name in ("hidden_size", "block_size", "rank")}

    def project(self, rows: Tensor, valid: Tensor | None = None) -> Projected:
        """Queries, keys and weights of ``rows [B, T, H]``, the sublayer's normed input, any float
        dtype.

        Args:
            rows: Whole sequence, or a chunk of it that begins at a block.
            valid: Mask of tokens, ``[B, T]`` bool, False at padding; None: all are tokens.
        """
        batch, tokens, _ = rows.shape
        if valid is None:
            valid = torch.ones(batch, tokens, dtype=torch.bool, device=rows.device)
        rows = rows.to(self.key.weight.dtype)
        padding = -tokens % self.block_size
        keys, queries, weights = (
            pad(part.float(), (0, 0, 0, padding)).unflatten(1, (-1, self.block_size))
            for part in (self.key(rows), self.query(rows), self.weight(rows))
        )
        keys, queries = normalize(keys, dim=3), normalize(queries, dim=3) * self.scale
        valid = pad(valid, (0, padding)).unflatten(1, (-1, self.block_size))
        return Projected(keys, queries, weights[..., 0], valid)

    def log_shares(
        self, projected: Projected, index: Tensor, asks: Tensor, documents: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Logarithms of the shares that asking blocks give the blocks before them, for a few asking
        blocks at a time.

        A block sees the blocks before it in its document, except the first, which holds the
        attention sink and is always kept.

        Args:
            projected: Projection of the whole sequence, as `project` makes it.
            index: Asking blocks, ``[B, M]`` int64; see `asked_shares.asking_index`.
            asks: Whether an entry asks, ``[B, M]`` bool, False at idle entries.
            documents: Id of each block's document, ``[B, N]``, or None.

        Yields:
            Logarithms, ``[B, m, N]`` fp32, about `HIDDEN` where a block is not seen.
        """
        keys, queries, weights, valid = projected
        batch, blocks, size, _ = keys.shape
        hidden, looks = ~valid, _sought(valid.any(2), documents)
        places = torch.arange(blocks, device=keys.device)
        at_once = max(1, PAIRS // (batch * blocks * size * size))
        flat = keys.flatten(1, 2).mT
        for start in range(0, index.shape[1], at_once):
            part = index[:, start : start + at_once, None]
            seen = (places < part) & looks[:, None] & asks[:, start : start + at_once, None]
            if documents is not None:
                seen &= documents[..., None].take_along_dim(part, 1) == documents[:, None]
            asking = queries.take_along_dim(part[..., None], 1)  # [B, m, size, rank]
            idle = hidden.take_along_dim(part, 1)
            share = weights.take_along_dim(part, 1).masked_fill(idle, HIDDEN).log_softmax(2)
            match = (asking.flatten(1, 2) @ flat).unflatten(2, (blocks, size))
            match = match.masked_fill(hidden[:, None], HIDDEN).amax(3)
            match = match.unflatten(1, (-1, size)).masked_fill(~seen[:, :, None], HIDDEN)
            given = (match.log_softmax(3) + share[..., None]).logsumexp(2)
            yield given.masked_fill(~seen, HIDDEN)

    def score(
        self, projected: Projected, index: Tensor, asks: Tensor, documents: Tensor | None = None
    ) -> Tensor:
        """Scores ``[B, N]`` fp32, at least 0: sums of the shares that each block gets; arguments as
        of `log_shares`."""
        shares = self.log_shares(projected, index, asks, documents)
        return torch.stack([part.exp().sum(1) for part in shares]).sum(0)

    def forward(
        self,
        rows: Tensor,
        index: Tensor,
        asks: Tensor,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        rare: Tensor | None = None,
    ) -> Tensor:
        """The `score` of the projection of ``rows``, `weighed` by ``rare``."""
        return self.score(self.project(rows, valid).weighed(rare), index, asks, documents)


def _sought(real: Tensor, documents: Tensor | None) -> Tensor:
    """Blocks that can be found: all that hold tokens, except the first of each document."""
    if documents is None:
        return real & (real.cumsum(1) > 1)
    return real & (documents.diff(dim=1, prepend=documents[:, :1] - 1) == 0)
