"""Block scores that need no training: by chance or by place, and the pooling others build on.

Pure functions of their inputs: the same batch, step and seed give the same scores on any device,
in a recomputation and after a resume.
"""

import torch
from torch import Tensor


def pool_blocks(rows: Tensor, valid: Tensor | None, block_size: int) -> Tensor:
    """Mean row of each block over its valid tokens.

    Args:
        rows: ``[B, T, H]``, any float dtype.
        valid: ``[B, T]`` bool or None.
        block_size: Tokens a block; the last one may be shorter.

    Returns:
        ``[B, ceil(T / block_size), H]`` in the dtype of ``rows``, 0 where a block has no token.
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
    """Later blocks score higher: ``[B, N]`` fp32."""
    return torch.arange(num_blocks, device=device).float().expand(batch, -1)


def row_keys(input_ids: Tensor, valid: Tensor | None) -> Tensor:
    """A 32-bit hash of each row's tokens, ``[B, T]`` to ``[B]`` int64; padding does not count."""
    valid = torch.ones_like(input_ids, dtype=torch.bool) if valid is None else valid
    ranks = valid.cumsum(1)
    return (_mix(input_ids.long() * 0x9E3779B1 + ranks) * valid).sum(1) & 0xFFFFFFFF


def random_scores(keys: Tensor, num_blocks: int, *salts: Tensor | int) -> Tensor:
    """Uniform scores in [0, 1) that depend on ``keys [B]``, the block and ``salts`` alone.

    ``salts`` are integers, or int64 scalar tensors of the same value.

    Returns:
        ``[B, num_blocks]`` fp32.
    """
    salt: Tensor | int = 0
    for value in salts:
        salt = (salt * 0x01000193 + value + 1) & 0x7FFFFFFF
    blocks = _mix(torch.arange(num_blocks, device=keys.device) + salt)
    return _mix(keys[:, None] ^ blocks).double().div(2**32).float()


def window_scores(keys: Tensor, real: Tensor, *salts: Tensor | int) -> Tensor:
    """Blocks that follow a random one, the nearest first; the first block follows the last.

    So the best of them are one window, or the end and the beginning of a row, and every block is
    as likely as every other to be among them. Blocks of padding, ``~real [B, N]``, are no part of
    the round.

    Returns:
        ``[B, N]`` fp32; ``keys [B]`` and ``salts`` as for `random_scores`.
    """
    counts = real.sum(1, keepdim=True).clamp_min(1)
    start = (random_scores(keys, 1, *salts) * counts).long()
    behind = (real.cumsum(1) - 1 - start) % counts
    return (counts - 1 - behind).float()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) whose output bits all depend on all inputs."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x045D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
