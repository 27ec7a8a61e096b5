"""The network that predicts a layer's block scores from what the layer is about to read.

Every token goes through one small map with ReLU (its units). The attention head makes a key of each
token's units and a query of each block's mean units; block m wants block n as much as its query
matches the best key in n, and a block's score adds up who wants it among the blocks that can see
it. The MLP head looks for the best token alone.

Keys are looked at token by token because the score is a maximum: means of 8 or 64 tokens lose 3 to
4 points of recall (docs/LOG.md). Scores are logarithms inside, so sums over query blocks are
log-sum-exps and nothing dies of a ReLU at the end.

This is what is trained. Where no gradient is needed, `lemo_hf.kernels.predict_blocks` gives the
same scores from the stream in front of the norm.

Source: LeMo, arXiv:2501.09767, "Context-aware Pattern Prediction".
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

HEADS = ("attention", "mlp")
# Pairs of a query block and a key token that exist at a time, 256 MiB in fp32.
PAIRS = 2**26
# The logarithm of a weight that is none; -inf would make gradients NaN.
HIDDEN = -1e9


class Embedded(NamedTuple):
    """What is kept of rows until all of a sequence is there, fp32."""

    keys: Tensor  # [B, N, block_size, rank]
    units: Tensor  # [B, N, units]: mean over a block's tokens
    valid: Tensor  # [B, N, block_size] bool

    @classmethod
    def join(cls, parts: list["Embedded"]) -> "Embedded":
        """Chunks of a sequence, in order, as one."""
        return cls(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))


class BlockPredictor(nn.Module):
    """Scores of token blocks, for the attention or the MLP of one layer.

    Args:
        hidden_size: H of the model.
        block_size: Tokens a block.
        units: ReLU units of the map that every token goes through.
        rank: Size of queries and keys; 1 for the MLP head.
        head: ``"attention"`` or ``"mlp"``.
        causal: A block's score depends on itself and what came before, on nothing later. It cannot
            know how many blocks will follow, so it must be a mean.
        normalize: Predict the mean over the query blocks that can see a block, not their sum.
        longest: Blocks of the longest sequence trained on; greater distances count as this one.

    Raises:
        ValueError: Unknown head, or a causal sum.
    """

    def __init__(
        self,
        hidden_size: int,
        block_size: int,
        units: int = 128,
        rank: int = 32,
        head: str = "attention",
        causal: bool = False,
        normalize: bool = False,
        longest: int = 1024,
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, got {head!r}")
        if causal and head == "attention" and not normalize:
            raise ValueError("causal=True predicts a mean: set normalize=True.")
        self.hidden_size, self.block_size, self.rank = hidden_size, block_size, rank
        self.head, self.causal, self.normalize, self.longest = head, causal, normalize, longest
        self.embed = nn.Linear(hidden_size, units)
        self.key = nn.Linear(units, rank, bias=False)
        if head == "attention":
            self.query = nn.Linear(units, rank)
        self.earlier: nn.Parameter
        self.later: nn.Parameter
        self.distance: nn.Parameter
        # Piecewise linear in the logarithm of a number of blocks: those before the block, those
        # after it, and how far away a query is.
        for name in self._tables:
            table = torch.zeros(math.ceil(math.log2(1 + longest)) + 1)
            self.register_parameter(name, nn.Parameter(table))

    @property
    def _tables(self) -> tuple[str, ...]:
        later = () if self.causal else ("later",)
        distance = ("distance",) if self.head == "attention" else ()
        return ("earlier", *later, *distance)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights anew, on the CPU, from ``generator`` alone."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            elif name == "query.bias":
                nn.init.normal_(parameter, std=0.3, generator=generator)
            else:
                nn.init.zeros_(parameter)
        self.key.weight.data.mul_(0.5)

    @property
    def units(self) -> int:
        """ReLU units there are now."""
        return self.embed.out_features

    def set_units(self, units: int) -> None:
        """Make the sizes agree with parameters from which units were taken."""
        self.embed.out_features = units
        for name in ("key", "query") if self.head == "attention" else ("key",):
            getattr(self, name).in_features = units

    @property
    def sizes(self) -> dict[str, int | bool | str]:
        """Arguments that make a module of these shapes."""
        return {
            "hidden_size": self.hidden_size,
            "block_size": self.block_size,
            "units": self.units,
            "rank": self.rank,
            "head": self.head,
            "causal": self.causal,
            "normalize": self.normalize,
            "longest": self.longest,
        }

    def embed_rows(self, rows: Tensor, valid: Tensor | None = None) -> Embedded:
        """What scores need of ``rows [B, T, H]``, the sublayer's normed input, any float dtype.

        Args:
            rows: A whole sequence, or a chunk of it that begins at a block.
            valid: ``[B, T]`` bool, False at padding; None: all are tokens.
        """
        batch, tokens, _ = rows.shape
        size = self.block_size
        if valid is None:
            valid = torch.ones(batch, tokens, dtype=torch.bool, device=rows.device)
        dtype = self.embed.weight.dtype
        units = self.embed(rows.to(dtype)).relu()
        padding = -tokens % size
        blocks = nn.functional.pad(units, (0, 0, 0, padding)).unflatten(1, (-1, size))
        valid = nn.functional.pad(valid, (0, padding)).unflatten(1, (-1, size))
        count = valid.sum(2, keepdim=True).clamp_min(1)
        mean = (blocks.float() * valid[..., None]).sum(2) / count
        return Embedded(self.key(blocks).float(), mean, valid)

    def forward(
        self, rows: Tensor, valid: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Logarithms of scores.

        Args:
            rows: ``[B, T, H]``, the sublayer's normed input.
            valid: ``[B, T]`` bool, False at padding, or None.
            documents: ``[B, N]`` id of each block's document, or None: blocks of two documents do
                not see each other.

        Returns:
            ``[B, ceil(T / block_size)]`` fp32; -inf at blocks of padding alone.
        """
        return self.score(self.embed_rows(rows, valid), documents)

    def score(self, embedded: Embedded, documents: Tensor | None = None) -> Tensor:
        """`forward` from what `embed_rows` gave."""
        keys, units, valid = embedded
        real = valid.any(2)  # [B, N]
        sees = _sees(real, documents)
        # A key that is padding must not be the best one.
        keys_hidden = ~valid
        if self.head == "mlp":
            scores = keys[..., 0].masked_fill(keys_hidden, HIDDEN).amax(2)
        else:
            query = self.query(units.to(self.query.weight.dtype)).float()
            # Causal scores ask what came before how it would want the block.
            wants = sees.mT if self.causal else sees
            scores = self._wanted(query, keys, keys_hidden, wants)
            if self.normalize:
                scores = scores - wants.sum(1).clamp_min(1).log()
        scores = scores + self._look_up(self.earlier, sees.sum(2))
        if not self.causal:
            scores = scores + self._look_up(self.later, sees.sum(1))
        return scores.masked_fill(~real, -math.inf)

    def _wanted(self, query: Tensor, keys: Tensor, keys_hidden: Tensor, wants: Tensor) -> Tensor:
        """``[B, N]``: log-sum-exp, over the query blocks that may want a block, of how much."""
        batch, blocks, size, _ = keys.shape
        chunk = max(1, PAIRS // (batch * blocks * size))
        places = torch.arange(blocks, device=keys.device)
        scores = []
        for start in range(0, blocks, chunk):
            part = slice(start, start + chunk)
            pairs = query @ keys[:, part].flatten(1, 2).mT
            pairs = pairs.masked_fill(keys_hidden[:, None, part].flatten(2), HIDDEN)
            pairs = pairs.unflatten(2, (-1, size)).amax(3)
            distance = (places[:, None] - places[part]).abs()
            pairs = pairs + self._look_up(self.distance, distance)
            scores.append(pairs.masked_fill(~wants[:, :, part], HIDDEN).logsumexp(1))
        return torch.cat(scores, 1)

    def _look_up(self, table: Tensor, count: Tensor) -> Tensor:
        """The piecewise linear function at ``count`` blocks."""
        place = count.clamp_max(self.longest).float().log1p() / math.log(2)
        low = place.long().clamp_max(len(table) - 2)
        weight = place - low
        table = table.float()
        return table[low] * (1 - weight) + table[low + 1] * weight


def _sees(real: Tensor, documents: Tensor | None) -> Tensor:
    """``[B, N, N]`` bool: query block (first) sees key block; both hold tokens of one document."""
    sees = (real[:, :, None] & real[:, None, :]).tril()
    if documents is not None:
        sees = sees & (documents[:, :, None] == documents[:, None, :])
    return sees
