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


def materialised_scores(
    query, key, size, scaling, valid, documents, window, softcap, normalize, dtype=torch.float64
):
    """The paper's definition with the whole ``[T, T]`` matrix.

    Args:
        dtype: Of the products: fp64, or fp32 as this device's own matrix products of 16-bit inputs
            give it.
    """
    tokens = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if dtype == torch.float64 or query.dtype == torch.float32 or not query.is_cuda:
        scores = query.to(dtype) @ key.to(dtype).mT * scaling
    else:
        pair = query.flatten(0, 1), key.flatten(0, 1).mT
        scores = torch.bmm(*pair, out_dtype=dtype).unflatten(0, query.shape[:2]) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(tokens, device=query.device)
    i, j = places[:, None], places[None]
    visible = (j <= i)[None].expand(len(query), -1, -1)
    if window is not None:
        visible = visible & (i - j < window)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None])
    if valid is not None:
        visible = visible & valid[:, :, None] & valid[:, None]
    scores = scores.clamp_min(0).mean(1) * visible
    padding = -tokens % size
    pad = (0, padding, 0, padding)
    blocks = torch.nn.functional.pad(scores, pad).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    seen = torch.nn.functional.pad(visible, pad).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    total = blocks.amax((2, 4)).sum(1)
    return total / seen.any(4).any(2).sum(1).clamp_min(1) if normalize else total
