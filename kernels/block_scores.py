"""The informativeness of token blocks: how much later queries want a block's keys.

With ``S_ij`` the mean over heads of ``max(q_i . k_j / sqrt(d), 0)`` for visible pairs and 0 for
hidden ones, block (m, n) of ``b x b`` tokens scores the maximum of ``S`` inside it, and token block
``n`` scores the sum over query blocks m.

The kernel goes through tiles of queries and keys as FlashAttention does: all heads of a tile are
added up in registers, then reduced to block maxima. Nothing of the size ``[T, T]`` is ever made,
only `CHUNKS` partial sums a block. Operations: those of QK^T, half of an attention forward.

Source: LeMo, arXiv:2501.09767, "Information-driven Token Elimination".
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo_hf.kernels.launch import INTERPRETED, use_triton

# Elements of the reference's largest buffer: 128 MiB in fp32, or one block of rows.
BUFFER = 2**25
# The kernel cuts the queries into this many parts, summed afterwards: enough programs at any T.
CHUNKS = 64


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
    """`block_scores` in plain PyTorch, one chunk of query rows after the other."""
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


@triton.jit
def _block_scores_kernel(
    query_ptr,  # [B, H, T, D], any strides but the last
    key_ptr,  # [B, H_kv, T, D], any strides but the last
    ids_ptr,  # [B, T] int32: pairs of one id >= 0 are visible
    sums_ptr,  # [CHUNKS, B, N] fp32, out
    seen_ptr,  # [CHUNKS, B, N] fp32, out
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    scale,
    softcap,
    window,
    tokens,
    blocks,
    heads,
    group,  # query heads a key head serves
    dim,
    steps,  # query spans a chunk
    span,  # tokens of a step: one block, or as many as fit a tile
    HAS_IDS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COUNT: tl.constexpr,  # query blocks that can see the block, too
    EVEN: tl.constexpr,  # D is BLOCK_D
    FULL: tl.constexpr,  # fp32: no tf32
    UPCAST: tl.constexpr,
    PARTS: tl.constexpr,  # tiles along a span
    PER: tl.constexpr,  # blocks along a tile, 1 if a block needs the tile or more
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    key_span = tl.program_id(0)
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.maximum(key_span, chunk * steps)
    last = tl.minimum((chunk + 1) * steps, tl.cdiv(tokens, span))
    if HAS_WINDOW:
        last = tl.minimum(last, ((key_span + 1) * span - 2 + window) // span + 1)
    query_ptr += batch * query_stride_b
    key_ptr += batch * key_stride_b
    place = tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_D)
    query_tile = place[:, None] * query_stride_t + column[None, :]
    key_tile = place[:, None] * key_stride_t + column[None, :]
    far = tl.full((), 0, tl.int64)  # what it is added to may be multiplied by a stride
    sums = tl.zeros((PER,), tl.float32)
    seen = tl.zeros((PER,), tl.float32)
    for query_span in range(first, last):
        best = tl.zeros((PER, PER), tl.float32)
        any_seen = tl.zeros((PER, PER), tl.float32)
        for part in range(PARTS * PARTS):
            row, col = part // PARTS * TILE, part % PARTS * TILE
            i = query_span * span + row + place
            j = key_span * span + col + place
            row_inside = (row + place < span) & (i < tokens)
            col_inside = (col + place < span) & (j < tokens)
            visible = (j[None, :] <= i[:, None]) & row_inside[:, None] & col_inside[None, :]
            if HAS_WINDOW:
                visible &= i[:, None] - j[None, :] < window
            present = heads
            if HAS_IDS:
                ids = ids_ptr + batch * tokens
                row_id = tl.load(ids + i, mask=row_inside, other=-1)
                col_id = tl.load(ids + j, mask=col_inside, other=-1)
                visible &= (row_id[:, None] == col_id[None, :]) & (row_id[:, None] >= 0)
                present = tl.where(tl.max(tl.max(visible.to(tl.int32), 1), 0) > 0, heads, 0)
            query = query_ptr + (far + query_span * span + row) * query_stride_t
            key = key_ptr + (far + key_span * span + col) * key_stride_t
            total = tl.zeros((TILE, TILE), tl.float32)
            for head in range(present):
                q_ptr = query + (far + head) * query_stride_h + query_tile
                k_ptr = key + (far + head // group) * key_stride_h + key_tile
                if EVEN:
                    q = tl.load(q_ptr, mask=row_inside[:, None], other=0.0)
                    k = tl.load(k_ptr, mask=col_inside[:, None], other=0.0)
                else:
                    within = column[None, :] < dim
                    q = tl.load(q_ptr, mask=row_inside[:, None] & within, other=0.0)
                    k = tl.load(k_ptr, mask=col_inside[:, None] & within, other=0.0)
                if UPCAST:
                    q, k = q.to(tl.float32), k.to(tl.float32)
                if FULL:
                    pairs = tl.maximum(tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
                else:
                    pairs = tl.maximum(tl.dot(q, tl.trans(k)), 0.0)
                if HAS_SOFTCAP:  # tanh of what is not negative
                    decay = tl.exp(-2.0 * scale / softcap * pairs)
                    pairs = (1.0 - decay) / (1.0 + decay)
                total += pairs
            total = tl.where(visible, total, 0.0)
            best = tl.maximum(best, _block_maxima(total, TILE, PER))
            if COUNT:
                any_seen = tl.maximum(any_seen, _block_maxima(visible.to(tl.float32), TILE, PER))
        sums += tl.sum(best, 1)
        seen += tl.sum(any_seen, 1)
    block = key_span * PER + tl.arange(0, PER)
    target = (chunk * tl.num_programs(2) + batch) * blocks + block
    factor = (softcap if HAS_SOFTCAP else scale) / heads
    tl.store(sums_ptr + target, sums * factor, mask=block < blocks)
    if COUNT:
        tl.store(seen_ptr + target, seen, mask=block < blocks)


@triton.jit
def _block_maxima(tile, TILE: tl.constexpr, PER: tl.constexpr):
    """Maxima of a ``[TILE, TILE]`` tile over its ``PER x PER`` blocks, keys first."""
    keys = tl.max(tl.reshape(tile, (TILE, PER, TILE // PER)), 2)  # [TILE, PER]
    return tl.max(tl.reshape(tl.trans(keys), (PER, PER, TILE // PER)), 2)


def _launch(
    query: Tensor,
    key: Tensor,
    block_size: int,
    scaling: float,
    ids: Tensor | None,
    window: int | None,
    softcap: float | None,
    normalize: bool,
) -> Tensor:
    batch, heads, tokens, dim = query.shape
    tile = 128 if dim <= 128 and query.element_size() == 2 else 64
    whole = block_size & (block_size - 1) == 0 and block_size <= tile  # blocks fill a tile
    if not whole:
        tile = min(tile, max(16, triton.next_power_of_2(block_size)))
    span = tile if whole else block_size
    blocks, spans = triton.cdiv(tokens, block_size), triton.cdiv(tokens, span)
    steps = triton.cdiv(spans, CHUNKS)
    chunks = triton.cdiv(spans, steps)
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    sums = torch.empty(chunks, batch, blocks, dtype=torch.float32, device=query.device)
    seen = torch.empty_like(sums) if normalize else None
    block_d = max(16, triton.next_power_of_2(dim))
    stage = 2 * tile * block_d * query.element_size()  # bytes of one tile of queries and keys
    with torch.cuda.device_of(query):
        _block_scores_kernel[(spans, chunks, batch)](
            query,
            key,
            ids,
            sums,
            seen,
            *query.stride()[:3],
            *key.stride()[:3],
            scaling,
            softcap,
            window,
            tokens,
            blocks,
            heads,
            heads // key.shape[1],
            dim,
            steps,
            span,
            HAS_IDS=ids is not None,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            COUNT=normalize,
            EVEN=block_d == dim,
            FULL=query.dtype == torch.float32,
            UPCAST=INTERPRETED,
            PARTS=triton.cdiv(span, tile),
            PER=tile // block_size if whole else 1,
            TILE=tile,
            BLOCK_D=block_d,
            num_warps=8 if tile == 128 else 4,
            num_stages=max(1, min(3, _shared_memory(query) // stage)),
        )
    scores = sums.sum(0)
    return scores if seen is None else scores / seen.sum(0).clamp_min(1)


def _shared_memory(x: Tensor) -> int:
    """Bytes a program may use for tiles on the way to it."""
    if not x.is_cuda:
        return 0
    properties: Any = torch.cuda.get_device_properties(x.device)  # its stubs lack this one
    return properties.shared_memory_per_block_optin


def block_scores(
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
    if not use_triton(query):
        return block_scores_reference(
            query,
            key,
            block_size,
            scaling,
            valid=valid,
            documents=documents,
            window=window,
            softcap=softcap,
            normalize=normalize,
        )
    ids = None if documents is None else documents.int()
    if valid is not None:
        ids = torch.zeros_like(valid, dtype=torch.int32) if ids is None else ids
        ids = ids.masked_fill(~valid, -1)
    ids = None if ids is None else ids.contiguous()
    return _launch(query, key, block_size, scaling, ids, window, softcap, normalize)
