"""Inputs of a layer besides the stream, gathered for a kept set."""

from typing import Any

import torch
from torch import Tensor

from lemo_hf.batch.selection import KeptSet
from lemo_hf.core.family import Family
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.rotary import KeptRotary


def kept_positions(
    position_embeddings: tuple[Tensor, Tensor] | None, kept: KeptSet
) -> tuple[KeptRotary, KeptRotary] | None:
    """Rotary cos and sin ``[B or 1, T, R]`` at the kept positions, which are gathered later."""
    if position_embeddings is None:
        return None
    key = "rotary", id(position_embeddings[0])  # held by what is cached, so no other has it
    if kept.cache is not None and key in kept.cache:
        return kept.cache[key]
    cos, sin = position_embeddings
    positions = KeptRotary(cos, kept.index), KeptRotary(sin, kept.index)
    if kept.cache is not None:
        kept.cache[key] = positions
    return positions


def kept_mask(mask: Tensor | None, kept: KeptSet) -> Tensor | None:
    """The attention mask among kept tokens.

    Args:
        mask: Mask as transformers gives it to a layer: None (causal), ``[B, T]`` padding mask
            (flash attention), or ``[B or 1, h, T, T]``, bool (True = visible) or additive float.
        kept: Kept set; its slots are in causal order, so None stays None.

    Returns:
        None, ``[B, K]`` or ``[B, h, K, K]``. Kept tokens do not see idle slots; an idle slot sees
        itself alone, so that no row of the softmax is empty.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        mask = mask.gather(1, kept.index)
        return mask if kept.slot_mask is None else mask * kept.slot_mask
    batch, slots = kept.index.shape
    mask = mask.expand(batch, -1, -1, -1)
    rows = torch.arange(batch, device=mask.device)[:, None, None]
    mask = mask[rows, :, kept.index[:, :, None], kept.index[:, None, :]].permute(0, 3, 1, 2)
    if kept.slot_mask is not None:
        itself = torch.eye(slots, dtype=torch.bool, device=mask.device)
        query, key = kept.slot_mask[:, None, :, None], kept.slot_mask[:, None, None, :]
        visible = torch.where(query, key, itself)
        if mask.dtype == torch.bool:
            return torch.where(query, mask, itself) & visible
        hidden = torch.finfo(mask.dtype).min
        mask = mask.masked_fill(~query & itself, 0.0)
        return mask.masked_fill(~visible, hidden)
    return mask.contiguous()


def kept_rows(x: Tensor | None, kept: KeptSet) -> Tensor:
    """The kept rows ``[B, K, D]`` of an input ``x [B, T, D]`` that some layers have."""
    assert x is not None
    return x if kept.whole else x.gather(1, kept.index[..., None].expand(-1, -1, x.shape[2]))


def kept_alibi(alibi: Tensor, kept: KeptSet) -> Tensor:
    """ALiBi at kept keys: the bias that is added to scores by the place of a key.

    Args:
        alibi: Bias, ``[B * heads, 1, T]`` or ``[B, heads, 1, T]``.
        kept: The set.

    Returns:
        The bias with K in place of T.
    """
    index = kept.index[:, None, None]
    by_row = alibi.view(len(index), -1, 1, alibi.shape[-1])
    found = by_row.gather(3, index.expand(-1, by_row.shape[1], -1, -1))
    return found.view(*alibi.shape[:-1], -1)


def kept_documents(documents: Tensor, kept: KeptSet) -> dict[str, Any]:
    """Document boundaries among kept tokens, as flash attention's variable-length arguments.

    Args:
        documents: ``[B, T]`` non-decreasing document ids.
        kept: Kept set. Idle slots at the end become a document of their own.
    """
    ids = documents.gather(1, kept.index)
    if kept.slot_mask is not None:
        ids = ids.masked_fill(~kept.slot_mask, -1)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    bounds = starts.flatten().nonzero().squeeze(1).to(torch.int32)
    bounds = torch.cat([bounds, bounds.new_tensor([ids.numel()])])
    longest = int(bounds.diff().max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def kept_attention_inputs(
    kept: KeptSet,
    sparse_pass: SparsePass,
    family: Family,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    alibi: Tensor | None,
    flash: bool,
) -> dict[str, Any]:
    """Keyword arguments of the attention module for the kept rows, without rotary positions.

    If tokens are left out, ``position_ids`` that only flash attention reads are left out too: it
    would take gaps between kept positions for document boundaries. It gets the real boundaries
    instead.
    """
    own: dict[str, Any] = {"residual": 0.0} if family.adds_residual else {}
    if kept.whole:
        own |= {} if position_ids is None else {"position_ids": position_ids}
        return {"attention_mask": attention_mask, **own}
    key = "mask", id(attention_mask)
    if kept.cache is not None and key in kept.cache:
        return kept.cache[key][1]
    inputs = {"attention_mask": kept_mask(attention_mask, kept), **own}
    documents = sparse_pass.documents
    if family.reads_positions and position_ids is not None:
        inputs["position_ids"] = position_ids.expand(len(kept.index), -1).gather(1, kept.index)
        if documents is None:  # flash attention must not look for them in these positions
            documents = position_ids.new_zeros(1, 1).expand(sparse_pass.batch, sparse_pass.tokens)
    if alibi is not None:
        inputs["alibi"] = kept_alibi(alibi, kept)
    if flash and documents is not None:
        inputs |= kept_documents(documents, kept)
    if kept.cache is not None:
        # The mask is held, or another one might get its place in memory, and with it its id.
        kept.cache[key] = attention_mask, inputs
    return inputs
