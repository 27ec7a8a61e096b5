"""The informativeness of token blocks: how much later queries want a block's keys.

With ``S_ij`` the mean over heads of ``max(q_i . k_j / sqrt(d), 0)`` for visible pairs and 0 for
hidden ones, block (m, n) of ``b x b`` tokens scores the maximum of ``S`` inside it, and token block
``n`` scores the sum over query blocks m. A streaming pass over query blocks, so that the largest
buffer is ``[B, H, rows, T]`` for as many rows as `BUFFER` elements allow, and never ``[T, T]``.

Source: LeMo, arXiv:2501.09767, "Information-driven Token Elimination".
"""

import torch
from torch import Tensor

# Elements of the largest buffer: 128 MiB in fp32 (more if a single block of rows needs more).
BUFFER = 2**25


def block_scores_reference(
    query: Tensor,
    key: Tensor,
    block_size: int,
    scaling: float,
    *,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Column sums of the causal block maxima of the head-mean positive attention score.

    Args:
        query: ``[B, H, T, D]``, any float dtype; the arithmetic is fp32.
        key: ``[B, H_kv, T, D]``; ``H`` a multiple of ``H_kv``.
        block_size: Tokens a block; the last block may be shorter.
        scaling: Factor of ``q . k``.
        valid: ``[B, T]`` bool, False at padding, or None.
        documents: ``[B, T]`` integer document ids, or None: pairs of two documents are hidden.
        window: Sliding window in tokens, or None: query i sees keys ``i - window < j <= i``.
        softcap: ``softcap * tanh(score / softcap)`` as in Gemma 2, or None.
        normalize: Divide by the number of query blocks that can see the block, which takes away
            the head start of early blocks.

    Returns:
        ``[B, ceil(T / block_size)]`` fp32, >= 0.
    """
    batch, heads, tokens, _ = query.shape
    num_blocks = -(-tokens // block_size)
    key = key.float().repeat_interleave(heads // key.shape[1], 1).mT
    positions = torch.arange(tokens, device=query.device)
    scores = torch.zeros(batch, num_blocks, device=query.device)
    seen_by = torch.zeros_like(scores)
    chunk = block_size * max(1, BUFFER // (batch * heads * tokens * block_size))
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        visible = positions <= positions[None, rows, None]  # [1, rows, T]
        if window is not None:
            visible = visible & (positions[rows, None] - positions < window)
        if documents is not None:
            visible = visible & (documents[:, rows, None] == documents[:, None, :])
        if valid is not None:
            visible = visible & valid[:, rows, None] & valid[:, None, :]
        pairs = (query[:, :, rows].float() @ key).mul_(scaling)  # [B, H, rows, T]
        if softcap is not None:
            pairs = pairs.div_(softcap).tanh_().mul_(softcap)
        pairs = pairs.clamp_min_(0).mean(1) * visible
        scores += _block_max(pairs, block_size).sum(1)
        seen_by += _block_max(visible.float(), block_size).sum(1)
    return scores / seen_by.clamp_min(1) if normalize else scores


def _block_max(pairs: Tensor, block_size: int) -> Tensor:
    """Maxima of non-negative ``pairs [B, rows, T]`` over blocks of ``block_size`` squared."""
    padding = (0, -pairs.shape[2] % block_size, 0, -pairs.shape[1] % block_size)
    blocks = torch.nn.functional.pad(pairs, padding)
    return blocks.unflatten(2, (-1, block_size)).unflatten(1, (-1, block_size)).amax((2, 4))
