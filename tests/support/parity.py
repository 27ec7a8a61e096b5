"""The one rule by which a kernel is right, and inputs for it."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_as_good(actual, truth, same_dtype):
    """No further from the truth than twice a plain reference at the same dtype, plus one ulp.

    Args:
        actual: What is tested.
        truth: The same in fp64, from the same rounded inputs.
        same_dtype: The reference at the dtype of ``actual``.
    """
    truth, same_dtype = truth.to(actual.device), same_dtype.to(actual.device)
    assert actual.shape == truth.shape and actual.dtype == same_dtype.dtype
    if not actual.numel():
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - truth).abs().max()
    allowed = 2 * (same_dtype.double() - truth).abs().max() + eps * truth.abs().max()
    assert error <= allowed, (error.item(), allowed.item())


def keep_index(batch, tokens, kept):
    """``[B, K]`` distinct ascending positions."""
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)])
    return order[:, :kept].sort(1).values


def materialised_shares(
    query, key, asking, size, scaling, valid=None, documents=None, window=None, softcap=None
):
    """What each block that asks gives each block, by the whole ``[T, T]`` matrix of attention.

    Returns:
        ``[B, N, N]`` fp64, 0 in the rows of blocks that do not ask.
    """
    batch, heads, tokens, _ = query.shape
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scores = query.double() @ key.double().mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    visible = (j <= i)[None].expand(batch, -1, -1)
    if window is not None:
        visible = visible & (i - j < window)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None])
    if valid is not None:
        visible = visible & valid[:, :, None] & valid[:, None]
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    blocks = -(-tokens // size)
    shares = torch.zeros(batch, blocks, blocks, dtype=torch.float64)
    for b in range(batch):
        for m in asking[b].nonzero()[:, 0].tolist():
            rows = scores[b, :, m * size : (m + 1) * size].split(size, 2)
            shares[b, m] = torch.stack([part.max() for part in rows]).softmax(0)
    return shares
