"""The informativeness of token blocks: how much later queries want a block's keys.

With ``S_ij`` the mean over heads of ``max(q_i . k_j / sqrt(d), 0)`` for visible pairs and 0 for
hidden ones, block (m, n) of ``b x b`` tokens scores the maximum of ``S`` inside it, and token block
``n`` scores the sum over query blocks m. A streaming pass over query blocks, so that the largest
buffer is ``[B, b, T]`` and never ``[T, T]``.

Source: LeMo, arXiv:2501.09767, "Information-driven Token Elimination".
"""

import torch
from torch import Tensor


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
    groups = heads // key.shape[1]
    num_blocks = -(-tokens // block_size)
    positions = torch.arange(tokens, device=query.device)
    scores = torch.zeros(batch, num_blocks, device=query.device)
    seen_by = torch.zeros_like(scores)
    for start in range(0, tokens, block_size):
        rows = slice(start, min(start + block_size, tokens))
        visible = positions[None, None, :] <= positions[None, rows, None]  # [1, b, T]
        if window is not None:
            visible = visible & (positions[rows, None] - positions < window)
        if documents is not None:
            visible = visible & (documents[:, rows, None] == documents[:, None, :])
        if valid is not None:
            visible = visible & valid[:, rows, None] & valid[:, None, :]
        mean = query.new_zeros(batch, rows.stop - start, tokens, dtype=torch.float32)
        for head in range(heads):
            score = query[:, head, rows].float() @ key[:, head // groups].float().mT * scaling
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            mean += score.clamp_min_(0)
        mean = mean.mul_(1 / heads) * visible
        scores += _pool_max(mean.amax(1), block_size, num_blocks)
        seen = visible.any(1).expand(batch, -1).float()
        seen_by += _pool_max(seen, block_size, num_blocks)
    return scores / seen_by.clamp_min(1) if normalize else scores


def _pool_max(columns: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """Maximum of non-negative ``columns [B, T]`` over blocks of tokens: ``[B, num_blocks]``."""
    padding = num_blocks * block_size - columns.shape[1]
    return torch.nn.functional.pad(columns, (0, padding)).unflatten(1, (num_blocks, -1)).amax(2)
