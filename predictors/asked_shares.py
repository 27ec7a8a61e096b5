"""How much asking blocks attend to each block, from real queries and keys.

An asking block m shares out one unit, ``p_mn = softmax_n(B_mn)`` over the blocks that it sees. B_mn
is the greatest attention logit of any of its tokens, in any head, on any key of block n. The score
of block n is the sum of p_mn over the asking blocks m.

The paper takes the positive part of logits, averages over heads, and sums the blocks' maxima over
all query blocks. The average hides the few heads that retrieve, and the sum without normalisation
favours early blocks by construction. docs/LOG.md has the measurements.

No ``[T, T]`` tensor is made: logits exist for a few query blocks at a time.

Sources: LeMo, arXiv:2501.09767 (maxima of blocks); SnapKV, arXiv:2404.14469 (queries that ask at
the end); QRHead, arXiv:2506.09944 (few heads retrieve); AhaKV, arXiv:2506.03762 (the sum's bias).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

# Logits that exist at a time: 128 MiB in fp32, or one query block's.
LOGITS = 2**25
HIDDEN = -1e9  # the logit of a pair that is none; -inf would make rows without pairs NaN


def asking_index(asking: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Indices of the asking blocks.

    Args:
        asking: Whether a block asks, ``[B, N]`` bool.
        most: Upper bound of the number of asking blocks of a row, known to the host.

    Returns:
        Indices, ``[B, most]`` int64, the asking blocks first and in order; and ``[B, most]`` bool:
        whether an entry asks.
    """
    order = asking.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
    return order, asking.gather(1, order)


def tokens_of(blocks: Tensor, block_size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Places of the tokens in ``blocks [B, M]``, and whether they exist, both ``[B, M * size]``."""
    places = blocks[..., None] * block_size + torch.arange(block_size, device=blocks.device)
    places = places.flatten(1)
    return places.clamp_max(tokens - 1), places < tokens


def asked_shares(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    asks: Tensor,
    block_size: int,
    scaling: float,
    *,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Iterator[Tensor]:
    """The shares ``p_mn``, for a few asking blocks at a time.

    Args:
        query: Queries, ``[B, H, T, D]``, any float dtype; logits are fp32.
        key: Keys, ``[B, H_kv, T, D]``; ``H`` is a multiple of ``H_kv``.
        index: Asking blocks, ``[B, M]`` int64; see `asking_index`.
        asks: Whether an entry asks, ``[B, M]`` bool, False at idle entries.
        block_size: Tokens a block; the last block may be shorter.
        scaling: Factor of ``q . k``.
        valid: Mask of tokens, ``[B, T]`` bool, False at padding, or None.
        documents: Document ids, ``[B, T]`` integer, or None. Tokens of different documents do not
            see each other.
        window: Sliding window in tokens, or None: query i sees keys ``i - window < j <= i``.
        softcap: Soft cap of scores, ``softcap * tanh(score / softcap)``, as in Gemma 2, or None.

    Yields:
        Shares, ``[B, m, N]`` fp32, which sum to 1 over the N blocks, or are 0 where an entry does
        not ask.
    """
    batch, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    keys = key.mT  # [B, H_kv, D, T]
    places = torch.arange(tokens, device=query.device)
    at_once = max(1, LOGITS // (batch * heads * tokens * block_size))
    for start in range(0, index.shape[1], at_once):
        blocks, real = index[:, start : start + at_once], asks[:, start : start + at_once]
        rows, inside = tokens_of(blocks, block_size, tokens)
        visible = places <= rows[..., None]  # [B, R, T]
        if window is not None:
            visible &= rows[..., None] - places < window
        if documents is not None:
            visible &= documents.gather(1, rows)[..., None] == documents[:, None]
        if valid is not None:
            visible &= valid[:, None]
            inside = inside & valid.gather(1, rows)
        part = torch.take_along_dim(query, rows[:, None, :, None], 2)  # [B, H, R, D]
        part = part.unflatten(1, (-1, groups)).flatten(2, 3)  # rows of a group meet the same keys
        logits = _products(part, keys).unflatten(2, (groups, -1)).flatten(1, 2)
        visible &= inside[..., None]
        best = logits.amax(1).masked_fill_(~visible, -math.inf)  # [B, R, T]
        best = pad(best, (0, -tokens % block_size), value=-math.inf)
        best = best.unflatten(2, (-1, block_size)).unflatten(1, (-1, block_size)).amax((2, 4))
        best = best * scaling  # what grows with logits may come after the maxima
        if softcap is not None:
            best = softcap * torch.tanh(best / softcap)
            best = best.masked_fill(best <= -softcap, HIDDEN)
        yield best.clamp_min(HIDDEN).softmax(2) * real[..., None]


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    """``[B, G, R, D] @ [B, G, D, T]`` in fp32, if possible in one product of 16-bit factors."""
    if not rows.is_cuda or rows.dtype == torch.float32:
        return rows.float() @ keys.float()
    with torch.autocast("cuda", enabled=False):
        product = torch.bmm(rows.flatten(0, 1), keys.flatten(0, 1), out_dtype=torch.float32)
    return product.unflatten(0, rows.shape[:2])
