"""Block scores that need no training, by chance or by place; and mean pooling of blocks.

Pure functions of their inputs: the same batch, step and seed give the same scores on any device,
in a recomputation and after a resume.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def pool_blocks(rows: Tensor, valid: Tensor | None, block_size: int) -> Tensor:
    """Mean row of each block over its valid tokens.

    Args:
        rows: Vectors of the tokens, ``[B, T, H]``, any float dtype.
        valid: Mask of tokens, ``[B, T]`` bool, or None.
        block_size: Tokens a block; the last one may be shorter.

    Returns:
        Means, ``[B, ceil(T / block_size), H]`` in the dtype of ``rows``, 0 where a block has no
        token.
    """
    batch, tokens, _ = rows.shape
    if valid is None:
        valid = torch.ones(1, tokens, dtype=torch.bool, device=rows.device).expand(batch, -1)
    else:
        rows = rows * valid[..., None]
    padding = -tokens % block_size
    rows = torch.nn.functional.pad(rows, (0, 0, 0, padding)).unflatten(1, (-1, block_size))
    counts = torch.nn.functional.pad(valid, (0, padding)).unflatten(1, (-1, block_size)).sum(2)
    return (rows.sum(2, dtype=torch.float32) / counts.clamp_min(1)[..., None]).to(rows.dtype)


def recent_scores(batch: int, num_blocks: int, device: torch.device) -> Tensor:
    """Scores ``[B, N]`` fp32, higher for later blocks."""
    return torch.arange(num_blocks, device=device).float().expand(batch, -1)


def row_keys(input_ids: Tensor, valid: Tensor | None) -> Tensor:
    """A 32-bit hash of each row's tokens, from ``[B, T]`` to ``[B]`` int64; padding does not
    count."""
    valid = torch.ones_like(input_ids, dtype=torch.bool) if valid is None else valid
    ranks = valid.cumsum(1)
    return (mix32(input_ids.long() * 0x9E3779B1 + ranks) * valid).sum(1) & 0xFFFFFFFF


def random_scores(keys: Tensor, num_blocks: int, *salts: Tensor | int) -> Tensor:
    """Uniform scores in [0, 1) that depend on ``keys [B]``, the block and ``salts`` alone.

    ``salts`` are integers, or int64 scalar tensors of the same value.

    Returns:
        ``[B, num_blocks]`` fp32.
    """
    blocks = torch.arange(num_blocks, device=keys.device)[None]
    return _uniform(keys, blocks, *salts)


@dataclass(frozen=True)
class Places:
    """The places of a batch's blocks within their documents, ``[B, N]`` int64 each.

    Attributes:
        document: Number of the block's document in its row, ascending.
        place: Place of the block within its document, from 0.
        size: Number of blocks of its document.
    """

    document: Tensor
    place: Tensor
    size: Tensor

    @classmethod
    def of(cls, real: Tensor, documents: Tensor | None) -> "Places":
        """The places of the blocks ``real [B, N]`` bool.

        ``documents [B, N]`` are ascending ids of documents; None: each row is one document.
        """
        if documents is None:
            size = real.sum(1, keepdim=True).expand_as(real)
            return cls(torch.zeros_like(size), (real.cumsum(1) - 1).clamp_min(0), size)
        begins = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
        document = begins.cumsum(1) - 1
        count = torch.arange(real.shape[1], device=real.device).expand_as(document)
        start = (count * begins).cummax(1).values
        size = torch.zeros_like(document).scatter_add_(1, document, torch.ones_like(document))
        return cls(document, count - start, size.gather(1, document))


def window_scores(keys: Tensor, places: Places, *salts: Tensor | int) -> Tensor:
    """Scores of the blocks behind a random one, the nearest highest; the first block follows the
    last.

    So the best blocks of a document are one window, or its end and its beginning, and every block
    is equally likely to be among them.

    Returns:
        ``[B, N]`` fp32; ``keys [B]`` and ``salts`` as for `random_scores`.
    """
    size = places.size.clamp_min(1)
    start = (_uniform(keys, places.document, *salts) * size).long()
    return (size - 1 - (places.place - start) % size).float()


def chunk_scores(keys: Tensor, places: Places, chunk: int, *salts: Tensor | int) -> Tensor:
    """One uniform score in [0, 1) for each run of ``chunk`` neighbouring blocks of a document.

    The end of a document's first run is also random, so that all pairs of neighbours are equally
    likely to be parted.

    Args:
        keys: Keys of the rows, ``[B]`` int64, see `row_keys`.
        places: Places of the blocks.
        chunk: Number of blocks of a run.
        *salts: Integers as for `random_scores`.

    Returns:
        ``[B, N]`` fp32.
    """
    first = (_uniform(keys, places.document, *salts, 1) * chunk).long()
    run = (places.place + first) // chunk
    return _uniform(keys, (places.document << 20) + run, *salts, 2)


def mix_ranks(first: Tensor, second: Tensor, share: float, real: Tensor) -> Tensor:
    """Scores whose best blocks are the best by two scores, ``share`` of them by the second.

    Args:
        first: Scores, ``[B, N]``; higher is better.
        second: Scores, ``[B, N]``, likewise.
        share: Share of the blocks by the second, in (0, 1).
        real: Blocks that count, ``[B, N]`` bool. Blocks of padding take no place before them.

    Returns:
        ``[B, N]`` fp32, negative.
    """
    first, second = (ranks(x.masked_fill(~real, -math.inf)) for x in (first, second))
    return -torch.minimum(first / (1 - share), second / share)


def ranks(scores: Tensor) -> Tensor:
    """Place of each block by its score, ``[B, N]`` fp32: 0.5 for the best, then 1.5, ..."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).float() + 0.5


def _uniform(keys: Tensor, labels: Tensor, *salts: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1), fp32, which depend on ``keys [B]``, ``labels [B, N]`` and
    ``salts`` alone."""
    salt: Tensor | int = 0
    for value in salts:
        salt = (salt * 0x01000193 + value + 1) & 0x7FFFFFFF
    return mix32(keys[:, None] ^ mix32(labels + salt)).double().div(2**32).float()


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) whose output bits all depend on all inputs."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x045D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
