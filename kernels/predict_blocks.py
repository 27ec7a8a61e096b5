"""The scores that a block predictor gives the blocks of a stream, from the stream itself.

A token's units are ``relu(W norm(x) + b)``. The norm's weight scales the columns of ``W``, and what
is left of the norm is one number a row (two for LayerNorm), which the pass that multiplies finds on
its way. So the first kernel reads the stream once and writes, of each token, a key and, of each
block, the sum of its tokens' queries: a query is linear in the units. The second goes through query
blocks as FlashAttention goes through keys: products, maxima over a key block's tokens, the distance
table, and a running log-sum-exp stay in registers.

Memory traffic, in elements: reads B*T*H and, from the L2 cache, units*H for each 128 tokens; writes
B*T*rank. Operations: B*T*H*units, and B*N*T*rank/2 of the second kernel.

Source: LeMo, arXiv:2501.09767, "Context-aware Pattern Prediction".
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear, pad

from lemo_hf.kernels.launch import INTERPRETED, use_triton
from lemo_hf.kernels.norm import KINDS, Norm, norm_reference

# Tokens a program of the first kernel embeds, and columns of the stream it multiplies at a time.
TILE, COLUMNS = 128, 64
STAGES = 5  # such column groups that are on their way
# The second kernel: key tokens a program, and query blocks at a time.
KEYS, QUERIES = 64, 64
# What the first kernel's registers and shared memory hold.
MOST_UNITS, MOST_RANK = 128, 64
# The logarithm of a weight that is none.
HIDDEN = tl.constexpr(-1e9)


def predict_blocks_reference(
    x: Tensor,
    norm: Norm | None,
    weights: dict[str, Tensor],
    block_size: int,
    *,
    longest: int,
    normalize: bool = False,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """`predict_blocks` in plain PyTorch, all pairs at once; arithmetic in fp32 (fp64 for fp64)."""
    rows = x if norm is None else norm_reference(x, norm)
    wide = torch.promote_types(rows.dtype, torch.float32)
    part = {name: tensor.to(wide) for name, tensor in weights.items()}
    if valid is None:
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    padding = -x.shape[1] % block_size
    valid = pad(valid, (0, padding)).unflatten(1, (-1, block_size))
    units = linear(rows.to(wide), part["embed.weight"], part["embed.bias"]).relu()
    units = pad(units, (0, 0, 0, padding)).unflatten(1, (-1, block_size))
    keys = linear(units, part["key.weight"])
    real = valid.any(2)
    sees = (real[:, :, None] & real[:, None]).tril()  # query block (first) sees key block
    if documents is not None:
        sees = sees & (documents[:, :, None] == documents[:, None])

    def look_up(name: str, count: Tensor) -> Tensor:
        place = count.clamp_max(longest).to(wide).log1p() / math.log(2)
        low = place.long().clamp_max(len(part[name]) - 2)
        return part[name][low].lerp(part[name][low + 1], place - low)

    if "query.weight" in weights:
        mean = (units * valid[..., None]).sum(2) / valid.sum(2, keepdim=True).clamp_min(1)
        query = linear(mean, part["query.weight"], part["query.bias"])
        pairs = torch.einsum("bmr,bnsr->bmns", query, keys)
        pairs = pairs.masked_fill(~valid[:, None], -math.inf).amax(3)
        place = torch.arange(real.shape[1], device=x.device)
        pairs = pairs + look_up("distance", (place[:, None] - place).abs())
        # Causal scores ask what came before how it would want the block.
        wants = sees if "later" in weights else sees.mT
        scores = pairs.masked_fill(~wants, -math.inf).logsumexp(1)
        if normalize:
            scores = scores - wants.sum(1).clamp_min(1).log()
    else:
        scores = keys[..., 0].masked_fill(~valid, -math.inf).amax(2)
    scores = scores + look_up("earlier", sees.sum(2))
    if "later" in weights:
        scores = scores + look_up("later", sees.sum(1))
    return scores.masked_fill(~real, -math.inf)


@triton.jit
def _embed_kernel(
    x_ptr,  # [B, T, H]
    weight_ptr,  # [units, H], the norm's weight in it
    bias_ptr,  # [units]
    shift_ptr,  # [units] fp32: sums of the weight's rows, for LayerNorm
    key_ptr,  # [rank, units]
    query_ptr,  # [rank, units]
    valid_ptr,  # [B, T], 0 at padding
    keys_ptr,  # [B, T, rank] fp32, out
    sums_ptr,  # [B, N, PARTS, rank] fp32, out: of queries without their bias
    counts_ptr,  # [B, N, PARTS] fp32, out: tokens that are no padding
    eps,
    one,  # 1.0, unknown to the compiler
    tokens,
    width,
    units,
    rank,
    blocks,
    span,  # tokens of consecutive tiles: one block, or as many as fit a tile
    KIND: tl.constexpr,
    ATTENTION: tl.constexpr,
    HAS_VALID: tl.constexpr,
    EVEN: tl.constexpr,  # H is a multiple of COLUMNS, units are BLOCK_U
    UPCAST: tl.constexpr,
    MAIN: tl.constexpr,  # precision of the product with the stream
    SMALL: tl.constexpr,  # and of those after it
    PARTS: tl.constexpr,  # tiles along a span
    PER: tl.constexpr,  # blocks along a tile, 1 if a block needs the tile or more
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    part = tl.program_id(0) % PARTS
    group = tl.program_id(0) // PARTS
    batch = tl.program_id(1).to(tl.int64)
    row = part * TILE + tl.arange(0, TILE)
    token = group * span + row
    inside = (row < span) & (token < tokens)
    column = tl.arange(0, COLUMNS)
    unit = tl.arange(0, BLOCK_U)
    r = tl.arange(0, BLOCK_R)
    first = batch * tokens + group * span  # row of B * T
    x_tile = x_ptr + first * width + row[:, None] * width + column[None, :]
    weight_tile = weight_ptr + unit[:, None] * width + column[None, :]
    acc = tl.zeros((TILE, BLOCK_U), tl.float32)
    squares = tl.zeros((TILE, COLUMNS), tl.float32)
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        if EVEN:
            x = tl.load(x_tile + start, mask=inside[:, None], other=0.0)
            weight = tl.load(weight_tile + start)
        else:
            within = start + column[None, :] < width
            x = tl.load(x_tile + start, mask=inside[:, None] & within, other=0.0)
            weight = tl.load(weight_tile + start, mask=(unit[:, None] < units) & within, other=0.0)
        wide = x.to(tl.float32)
        if KIND > 0:
            squares += wide * wide
        if KIND == 3:
            total += wide
        if UPCAST:
            x, weight = wide, weight.to(tl.float32)
        else:
            x = x.to(weight.dtype)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=MAIN)
        if KIND > 0:
            # Touching the sums makes Triton wait for this product. It would let it run on into the
            # next load, which overwrites x: a load with two readers gets one buffer too few.
            acc *= one
    some = unit < units
    if KIND > 0:
        variance = tl.sum(squares, 1) / width
        if KIND == 3:
            mean = tl.sum(total, 1) / width
            variance -= mean * mean
            shift = tl.load(shift_ptr + unit, mask=some, other=0.0)
            acc -= mean[:, None] * shift[None, :]
        acc *= tl.rsqrt(tl.maximum(variance, 0.0) + eps)[:, None]
    acc += tl.load(bias_ptr + unit, mask=some, other=0.0).to(tl.float32)[None, :]
    acc = tl.maximum(acc, 0.0)
    used = (r[:, None] < rank) & some[None, :]
    table = r[:, None] * units + unit[None, :]
    weight = tl.load(key_ptr + table, mask=used, other=0.0).to(tl.float32)
    keys = tl.dot(acc, tl.trans(weight), input_precision=SMALL)
    place = keys_ptr + first * rank + row[:, None] * rank + r[None, :]
    tl.store(place, keys, mask=inside[:, None] & (r[None, :] < rank))

    if HAS_VALID:
        inside &= tl.load(valid_ptr + first + row, mask=inside, other=0) != 0
    block = group * PER + tl.arange(0, PER)
    target = (batch * blocks + block) * PARTS + part
    count = tl.sum(tl.reshape(inside.to(tl.float32), (PER, TILE // PER)), 1)
    tl.store(counts_ptr + target, count, mask=block < blocks)
    if ATTENTION:
        weight = tl.load(query_ptr + table, mask=used, other=0.0).to(tl.float32)
        queries = tl.dot(acc, tl.trans(weight), input_precision=SMALL)
        queries = tl.where(inside[:, None], queries, 0.0)
        queries = tl.sum(tl.reshape(queries, (PER, TILE // PER, BLOCK_R)), 1)
        place = sums_ptr + target[:, None] * rank + r[None, :]
        tl.store(place, queries, mask=(block[:, None] < blocks) & (r[None, :] < rank))


@triton.jit
def _look_up(table_ptr, count, longest, last):
    """The piecewise linear function at ``count`` blocks."""
    count = tl.minimum(tl.maximum(count, 0), longest)
    place = tl.log2(1.0 + count.to(tl.float32))
    low = tl.minimum(place.to(tl.int32), last)
    left = tl.load(table_ptr + low).to(tl.float32)
    right = tl.load(table_ptr + low + 1).to(tl.float32)
    return left + (place - low.to(tl.float32)) * (right - left)


@triton.jit
def _together(counts_ptr, documents_ptr, m, n, blocks, HAS_DOCUMENTS: tl.constexpr):
    """``[M, N]``: blocks of one document that hold tokens."""
    m_inside, n_inside = m < blocks, n < blocks
    m_real = tl.load(counts_ptr + m, mask=m_inside, other=0.0) > 0
    n_real = tl.load(counts_ptr + n, mask=n_inside, other=0.0) > 0
    together = m_real[:, None] & n_real[None, :]
    if HAS_DOCUMENTS:
        m_document = tl.load(documents_ptr + m, mask=m_inside, other=0)
        n_document = tl.load(documents_ptr + n, mask=n_inside, other=0)
        together &= m_document[:, None] == n_document[None, :]
    return together


@triton.jit
def _score_kernel(
    keys_ptr,  # [B, T, rank] fp32
    sums_ptr,  # [B, N, rank] fp32
    counts_ptr,  # [B, N] fp32
    valid_ptr,  # [B, T], 0 at padding
    documents_ptr,  # [B, N]
    bias_ptr,  # [rank], of queries
    distance_ptr,
    earlier_ptr,
    later_ptr,
    out_ptr,  # [B, N] fp32
    tokens,
    rank,
    blocks,
    span,
    longest,
    last,  # entries of a table, less 2
    ATTENTION: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # tiles along a span
    PER: tl.constexpr,  # blocks along a tile, 1 if a block needs the tile or more
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    counts_ptr += batch * blocks
    if HAS_DOCUMENTS:
        documents_ptr += batch * blocks
    keys_ptr += (batch * tokens + group * span) * rank
    place = tl.arange(0, TILE)
    n = group * PER + tl.arange(0, PER)
    r = tl.arange(0, BLOCK_R)
    if HAS_VALID or HAS_DOCUMENTS:
        earlier = tl.zeros((PER,), tl.int32)
        later = tl.zeros((PER,), tl.int32)
        for start in range(0, blocks, QUERIES):
            m = start + tl.arange(0, QUERIES)
            together = _together(counts_ptr, documents_ptr, m, n, blocks, HAS_DOCUMENTS)
            earlier += tl.sum((together & (m[:, None] <= n[None, :])).to(tl.int32), 0)
            later += tl.sum((together & (m[:, None] >= n[None, :])).to(tl.int32), 0)
    else:
        earlier = n + 1
        later = blocks - n

    if ATTENTION:
        if CAUSAL:
            first = 0
            end = tl.minimum((group + 1) * PER, blocks)
        else:
            first = group * PER // QUERIES * QUERIES
            end = blocks
        bias = tl.load(bias_ptr + r, mask=r < rank, other=0.0).to(tl.float32)
        top = tl.full((PER,), HIDDEN, tl.float32)
        total = tl.zeros((PER,), tl.float32)
        for start in range(first, end, QUERIES):
            m = start + tl.arange(0, QUERIES)
            used = (m[:, None] < blocks) & (r[None, :] < rank)
            count = tl.load(counts_ptr + m, mask=m < blocks, other=0.0)
            query = tl.load(
                sums_ptr + (batch * blocks + m[:, None]) * rank + r[None, :], mask=used, other=0.0
            )
            query = query / tl.maximum(count, 1.0)[:, None] + bias[None, :]
            pairs = tl.full((QUERIES, PER), HIDDEN, tl.float32)
            for part in range(PARTS):
                row = part * TILE + place
                inside = (row < span) & (group * span + row < tokens)
                key = tl.load(
                    keys_ptr + row[:, None] * rank + r[None, :],
                    mask=inside[:, None] & (r[None, :] < rank),
                    other=0.0,
                )
                if HAS_VALID:
                    valid = valid_ptr + batch * tokens + group * span + row
                    inside &= tl.load(valid, mask=inside, other=0) != 0
                product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                product = tl.where(inside[None, :], product, HIDDEN)
                product = tl.max(tl.reshape(product, (QUERIES, PER, TILE // PER)), 2)
                pairs = tl.maximum(pairs, product)
            apart = tl.abs(m[:, None] - n[None, :])
            pairs += _look_up(distance_ptr, apart, longest, last)
            wants = _together(counts_ptr, documents_ptr, m, n, blocks, HAS_DOCUMENTS)
            if CAUSAL:
                wants &= m[:, None] <= n[None, :]
            else:
                wants &= m[:, None] >= n[None, :]
            pairs = tl.where(wants, pairs, HIDDEN)
            higher = tl.maximum(top, tl.max(pairs, 0))
            share = tl.where(wants, tl.exp(pairs - higher[None, :]), 0.0)
            total = total * tl.exp(top - higher) + tl.sum(share, 0)
            top = higher
        # The greatest share is 1; nobody wants blocks of padding, whose total is 0.
        scores = top + tl.log(tl.maximum(total, 1.0))
        if NORMALIZE:
            wanted = later
            if CAUSAL:
                wanted = earlier
            scores -= tl.log(tl.maximum(wanted, 1).to(tl.float32))
    else:
        scores = tl.full((PER,), HIDDEN, tl.float32)
        for part in range(PARTS):
            row = part * TILE + place
            inside = (row < span) & (group * span + row < tokens)
            if HAS_VALID:
                valid = valid_ptr + batch * tokens + group * span + row
                inside &= tl.load(valid, mask=inside, other=0) != 0
            key = tl.load(keys_ptr + row * rank, mask=inside, other=HIDDEN)
            scores = tl.maximum(scores, tl.max(tl.reshape(key, (PER, TILE // PER)), 1))
    scores += _look_up(earlier_ptr, earlier, longest, last)
    if not CAUSAL:
        scores += _look_up(later_ptr, later, longest, last)
    real = tl.load(counts_ptr + n, mask=n < blocks, other=0.0) > 0
    scores = tl.where(real, scores, -float("inf"))
    tl.store(out_ptr + batch * blocks + n, scores, mask=n < blocks)


def _folded(
    norm: Norm | None, weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The first map with the norm's weight and bias in it: weight, bias, and the weight's sums.

    Made anew at each call, which takes microseconds: nothing tells for sure that a parameter which
    FSDP gathers, or an optimizer writes through ``.data``, is still the same.
    """
    weight, bias = weights["embed.weight"], weights["embed.bias"]
    if norm is None:
        return weight.to(dtype), bias, None
    folded = torch.empty_like(weight, dtype=dtype)
    scale = 1 + norm.weight.float() if norm.kind == "rms_plus_one" else norm.weight
    torch.mul(weight, scale, out=folded)
    if norm.bias is not None:
        bias = bias.float() + (weight.float() * norm.bias.float()).sum(1)
    return folded, bias, folded.float().sum(1) if norm.kind == "layer" else None


def _tiling(block_size: int, tile: int) -> tuple[int, int, int, int]:
    """Tokens a tile, tokens of consecutive tiles, tiles along those, blocks along a tile."""
    if block_size & (block_size - 1) == 0 and block_size <= tile:  # blocks fill a tile
        return tile, tile, 1, tile // block_size
    tile = min(tile, max(16, triton.next_power_of_2(block_size)))
    return tile, block_size, triton.cdiv(block_size, tile), 1


def _stages(x: Tensor, stage: int) -> int:
    """How many stages of so many bytes may be on their way, besides what comes after them."""
    if not x.is_cuda:
        return 1
    properties: Any = torch.cuda.get_device_properties(x.device)  # its stubs lack this one
    memory = properties.shared_memory_per_block_optin
    return max(1, min(STAGES, (memory - 2**15) // stage))


def _launch(
    x: Tensor,
    norm: Norm | None,
    weights: dict[str, Tensor],
    block_size: int,
    longest: int,
    normalize: bool,
    valid: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    batch, tokens, width = x.shape
    rank, units = weights["key.weight"].shape
    attention = "query.weight" in weights
    blocks = triton.cdiv(tokens, block_size)
    # A 32-bit stream under autocast is multiplied as a Linear would multiply it.
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        cast = torch.get_autocast_dtype(x.device.type)
        dtype = cast if cast == torch.bfloat16 else dtype
    full = dtype == torch.float32
    weight, bias, shift = _folded(norm, weights, dtype)
    block_u = max(16, triton.next_power_of_2(units))
    block_r = max(16, triton.next_power_of_2(rank))
    columns = 32 if full else COLUMNS
    tile, span, parts, per = _tiling(block_size, 64 if full else TILE)
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    keys = torch.empty(batch, tokens, rank, **new)
    sums = torch.empty(batch, blocks, parts, rank, **new) if attention else None
    counts = torch.empty(batch, blocks, parts, **new)
    scores = torch.empty(batch, blocks, **new)
    small = "ieee" if full else "tf32x3"
    with torch.cuda.device_of(x):
        _embed_kernel[(triton.cdiv(tokens, span) * parts, batch)](
            x,
            weight,
            bias,
            shift,
            weights["key.weight"],
            weights.get("query.weight"),
            valid,
            keys,
            sums,
            counts,
            norm.eps if norm else 0.0,
            1.0,
            tokens,
            width,
            units,
            rank,
            blocks,
            span,
            KIND=KINDS[norm.kind] if norm else 0,
            ATTENTION=attention,
            HAS_VALID=valid is not None,
            EVEN=width % columns == 0 and units == block_u,
            UPCAST=INTERPRETED,
            MAIN="ieee" if full else "tf32",
            SMALL=small,
            PARTS=parts,
            PER=per,
            TILE=tile,
            COLUMNS=columns,
            BLOCK_U=block_u,
            BLOCK_R=block_r,
            num_warps=8 if tile == 128 else 4,
            num_stages=_stages(
                x, columns * (tile * x.element_size() + block_u * weight.element_size())
            ),
        )
        if parts > 1:
            sums, counts = None if sums is None else sums.sum(2), counts.sum(2)
        tile, span, parts, per = _tiling(block_size, KEYS)
        _score_kernel[(triton.cdiv(tokens, span), batch)](
            keys,
            sums,
            counts,
            valid,
            documents,
            weights.get("query.bias"),
            weights.get("distance"),
            weights["earlier"],
            weights.get("later"),
            scores,
            tokens,
            rank,
            blocks,
            span,
            longest,
            len(weights["earlier"]) - 2,
            ATTENTION=attention,
            CAUSAL="later" not in weights,
            NORMALIZE=normalize,
            HAS_VALID=valid is not None,
            HAS_DOCUMENTS=documents is not None,
            PRECISION=small,
            PARTS=parts,
            PER=per,
            TILE=tile,
            QUERIES=QUERIES,
            BLOCK_R=block_r,
            num_warps=4,
            num_stages=2,
        )
    return scores


@torch.no_grad()
def predict_blocks(
    x: Tensor,
    norm: Norm | None,
    weights: dict[str, Tensor],
    block_size: int,
    *,
    longest: int,
    normalize: bool = False,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Logarithms of the scores that a `BlockPredictor` gives, without gradient.

    Args:
        x: Stream, ``[B, T, H]``, any float dtype. The product with it is taken in this dtype (bf16
            under bf16 autocast) and summed in fp32; all other arithmetic is fp32.
        norm: Of the sublayer, or None if it reads the stream as it is.
        weights: The network's parameters by name, any float dtype: ``embed.weight [units, H]``,
            ``embed.bias``, ``key.weight [rank, units]``, ``earlier``; ``query.weight``,
            ``query.bias`` and ``distance`` of an attention head; ``later`` unless it is causal.
        block_size: Tokens a block; the last block may be shorter.
        longest: Greater numbers of blocks count as this one; at least 1.
        normalize: Of an attention head: the mean over query blocks, not their sum.
        valid: ``[B, T]`` bool, False at padding, or None.
        documents: ``[B, N]`` integer id of each block's document, or None.

    Returns:
        ``[B, ceil(T / block_size)]`` fp32 (fp64 by the definition, for fp64); -inf at blocks of
        padding alone.

    Raises:
        ValueError: More than `MOST_UNITS` units, or a rank above `MOST_RANK`.
    """
    rank, units = weights["key.weight"].shape
    if units > MOST_UNITS or rank > MOST_RANK:
        raise ValueError(f"{units} units of rank {rank}: at most {MOST_UNITS} of {MOST_RANK} fit")
    if not use_triton(x) or x.dtype == torch.float64:
        return predict_blocks_reference(
            x,
            norm,
            weights,
            block_size,
            longest=longest,
            normalize=normalize,
            valid=valid,
            documents=documents,
        )
    return _launch(
        x.contiguous(),
        norm,
        {name: tensor.detach().contiguous() for name, tensor in weights.items()},
        block_size,
        longest,
        normalize,
        None if valid is None else valid.contiguous().view(torch.uint8),
        None if documents is None else documents.contiguous(),
    )
