"""Policies, which rank the blocks of a layer: one function a policy.

Each maps a `ScoreInputs` to block scores ``[B, N]`` without gradient; higher is better.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from lemo_hf.core.family import Family
from lemo_hf.core.query_key import query_key
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.core.sublayer import mlp_calls
from lemo_hf.kernels.replayed import Replayed
from lemo_hf.predictors.asked_shares import asked_shares, asking_index
from lemo_hf.predictors.block_predictor import BlockPredictor, Projected
from lemo_hf.predictors.overlap import overlap_scores
from lemo_hf.predictors.rarity import rarity
from lemo_hf.predictors.training_free import (
    chunk_scores,
    mix_ranks,
    pool_blocks,
    random_scores,
    recent_scores,
    window_scores,
)

logger = logging.get_logger(__name__)

# Of the blocks that a row with a predictor keeps for its labels: the predictor's part.
MEANING = 0.5
# Tokens whose normed rows exist at a time while a whole sequence is scored.
CHUNK = 8192

_overlap_scores = Replayed(overlap_scores)


@dataclass(frozen=True)
class ScoreInputs:
    """Inputs of a policy: the layer and the stream that it is about to read.

    Attributes:
        layer: Decoder layer.
        family: Names of its parts.
        layer_index: Index of the layer in the model.
        sublayer: Name of the sublayer that chooses: ``"attention"`` or ``"mlp"``.
        x: Residual stream, ``[B, T, H]``; this process's shard if processes share the sequence.
        position_embeddings: Rotary ``(cos, sin)`` of ``[B or 1, T, D]`` each, or None.
        sparse_pass: Sparse pass under way, which has the batch's padding, documents and seeds.
        predictor: Predictor of this layer and sublayer, or None.
        position_ids: ``[B or 1, T]`` if the family's attention reads them, or None.
    """

    layer: nn.Module
    family: Family
    layer_index: int
    sublayer: str
    x: Tensor
    position_embeddings: tuple[Tensor, Tensor] | None
    sparse_pass: SparsePass
    predictor: BlockPredictor | None
    position_ids: Tensor | None = None


def sublayer_input(inputs: ScoreInputs, rows: Tensor) -> Tensor:
    """Input of the attention or MLP module for ``rows``: their norm, if the family has one."""
    norm = _input_norm(inputs)
    return rows if norm is None else norm(rows)


def _attention(inputs: ScoreInputs) -> nn.Module:
    return getattr(inputs.layer, inputs.family.attention)


def _input_norm(inputs: ScoreInputs) -> nn.Module | None:
    """The norm before the attention or MLP, if there is one."""
    family, layer = inputs.family, inputs.layer
    name = family.attention_norm if inputs.sublayer == "attention" else family.mlp_norm
    if name is None or (family.pre_norm_flag and not getattr(layer, family.pre_norm_flag)):
        return None
    return getattr(layer, name)


def oracle(inputs: ScoreInputs) -> Tensor:
    """How much asking blocks attend to a block, by the layer's real queries and keys.

    An MLP with a kept set of its own keeps the blocks with its largest activations, or, if it has
    experts, with its largest updates.
    """
    sparse_pass, size = inputs.sparse_pass, inputs.sparse_pass.config.block_size
    if inputs.sublayer == "attention":
        return _summed(oracle_shares(inputs, *_asking(inputs)))
    tokens = torch.cat([_mlp_activity(inputs, chunk) for chunk in inputs.x.split(CHUNK, dim=1)], 1)
    tokens = tokens if sparse_pass.valid is None else tokens * sparse_pass.valid
    padding = -sparse_pass.tokens % size
    return nn.functional.pad(tokens, (0, padding)).unflatten(1, (-1, size)).amax(2)


def oracle_shares(inputs: ScoreInputs, index: Tensor, asks: Tensor) -> Iterator[Tensor]:
    """Shares that each asking block gives each block by the layer's attention; see `asked_shares`.

    Raises:
        ValueError: The family's attention does not give out its queries and keys.
    """
    if inputs.family.own_attention:
        raise ValueError(
            f"{type(_attention(inputs)).__name__} of transformers does not give out its queries "
            "and keys. For this family no predictor can be trained and no recall measured. Use "
            "policy='auto'."
        )
    sparse_pass = inputs.sparse_pass
    captured = query_key(
        _attention(inputs),
        sublayer_input(inputs, inputs.x),
        inputs.position_embeddings,
        inputs.position_ids,
    )
    return asked_shares(
        captured.query,
        captured.key,
        index,
        asks,
        sparse_pass.config.block_size,
        captured.scaling,
        valid=sparse_pass.valid,
        documents=sparse_pass.documents,
        window=captured.window,
        softcap=captured.softcap,
    )


def pooled(inputs: ScoreInputs) -> Tensor:
    """The score of `oracle` from one query and one key a block: those of its mean row, at its
    middle."""
    sparse_pass, size = inputs.sparse_pass, inputs.sparse_pass.config.block_size
    parts = [
        pool_blocks(sublayer_input(inputs, inputs.x[:, part]), valid, size)
        for part, valid in _chunks(inputs)
    ]
    means = _whole(inputs, torch.cat(parts, 1))
    if inputs.sublayer == "mlp":
        return _mlp_activity(inputs, means, normed=True)
    positions = inputs.position_embeddings
    if positions is not None:
        cos, sin = (torch.take_along_dim(x, sparse_pass.middles[..., None], 1) for x in positions)
        positions = (cos, sin)
    places = inputs.position_ids
    if places is not None:
        places = torch.take_along_dim(places, sparse_pass.middles, 1)
    captured = query_key(_attention(inputs), means, positions, places)
    return _summed(
        asked_shares(
            captured.query,
            captured.key,
            *_asking(inputs),
            1,
            captured.scaling,
            valid=sparse_pass.real,
            documents=sparse_pass.block_documents,
            window=captured.window and max(1, captured.window // size),
            softcap=captured.softcap,
        )
    )


def _asking(inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    """Asking blocks, as `asking_index` gives them."""
    sparse_pass = inputs.sparse_pass
    most = max(1, *(row.most_label_blocks or row.blocks for row in sparse_pass.rows))
    return asking_index(sparse_pass.asking_blocks, most)


def _summed(shares: Iterator[Tensor]) -> Tensor:
    """``[B, N]``: sums of the shares of all asking blocks."""
    return torch.stack([part.sum(1) for part in shares]).sum(0)


def random(inputs: ScoreInputs) -> Tensor:
    """Uniform scores, fixed by the seed, the optimizer step, the layer and the row's own tokens."""
    return random_scores(inputs.sparse_pass.keys, inputs.sparse_pass.num_blocks, *_salts(inputs))


def window(inputs: ScoreInputs) -> Tensor:
    """Neighbours from a random place on, fixed like the scores of `random`."""
    return window_scores(inputs.sparse_pass.keys, inputs.sparse_pass.places, *_salts(inputs))


def chunks(inputs: ScoreInputs) -> Tensor:
    """Runs of neighbouring blocks by chance, fixed like the scores of `random`."""
    sparse_pass = inputs.sparse_pass
    chunk = max(1, sparse_pass.config.chunk_size // sparse_pass.config.block_size)
    return chunk_scores(sparse_pass.keys, sparse_pass.places, chunk, *_salts(inputs))


def overlap(inputs: ScoreInputs) -> Tensor:
    """Rare words shared with label blocks and the block before each.

    Blocks that share nothing come after the others, by chance as in `chunks`. In a row that is
    labelled throughout these are all blocks.
    """
    return _with_chance(inputs, _shared_words(inputs))


def _shared_words(inputs: ScoreInputs) -> Tensor:
    sparse_pass = inputs.sparse_pass
    if sparse_pass.input_ids is None:
        raise ValueError(
            "policy='overlap' compares tokens, and the batch has inputs_embeds instead of "
            "input_ids: use policy='chunks'."
        )
    shared = _overlap_scores(
        sparse_pass.input_ids,
        sparse_pass.asking_tokens,
        sparse_pass.config.block_size,
        sparse_pass.valid,
        sparse_pass.documents,
    )
    return torch.where(shared > 0, 1 + shared, chunks(inputs))


def auto(inputs: ScoreInputs) -> Tensor:
    """`overlap` for rows of which a part is labelled, `chunks` for rows labelled throughout.

    `chunks` for all rows if the model gets ``inputs_embeds`` (prompt tuning), since words are then
    unknown.
    """
    sparse_pass = inputs.sparse_pass
    if not any(row.label_blocks for row in sparse_pass.rows):
        return chunks(inputs)
    if sparse_pass.input_ids is None:
        logger.warning_once(
            "LeMo: the batch has inputs_embeds instead of input_ids, so no words can be compared. "
            "Blocks are kept by chance (policy='chunks')."
        )
        return chunks(inputs)
    return overlap(inputs)


def _with_chance(inputs: ScoreInputs, scores: Tensor) -> Tensor:
    share = inputs.sparse_pass.config.chance
    if not share:
        return scores
    return mix_ranks(scores, chunks(inputs), share, inputs.sparse_pass.real)


def _salts(inputs: ScoreInputs) -> tuple[Tensor | int, ...]:
    sparse_pass = inputs.sparse_pass
    return (
        sparse_pass.config.seed,
        sparse_pass.global_step,
        inputs.layer_index,
        inputs.sublayer == "mlp",
    )


def recent(inputs: ScoreInputs) -> Tensor:
    """Position: later blocks rank higher."""
    return recent_scores(inputs.sparse_pass.batch, inputs.sparse_pass.num_blocks, inputs.x.device)


def predictor(inputs: ScoreInputs) -> Tensor:
    """How much asking blocks will need a block, as the layer's predictor says.

    In rows whose labels cover a part, half of the blocks are the best by `overlap`: one of the two
    often finds what the other misses (docs/predictors.md). With thresholds only the predictor's
    scores count.
    """
    sparse_pass, network = inputs.sparse_pass, inputs.predictor
    assert network is not None  # see `check_predictors`
    parts = [
        network.project(sublayer_input(inputs, inputs.x[:, part]), valid)
        for part, valid in _chunks(inputs)
    ]
    projected = Projected(*(_whole(inputs, x) for x in Projected.join(parts)))
    ids, documents = sparse_pass.input_ids, sparse_pass.block_documents
    rare = None if ids is None else rarity(ids, sparse_pass.valid, sparse_pass.documents)
    scores = network.score(projected.weighed(rare), *_asking(inputs), documents)
    asks = any(row.label_blocks for row in sparse_pass.rows) and ids is not None
    if asks and sparse_pass.config.threshold is None and sparse_pass.config.mlp_threshold is None:
        both = mix_ranks(_shared_words(inputs), scores, MEANING, sparse_pass.real)
        scores = torch.where(sparse_pass.asks, both, scores)
    return _with_chance(inputs, scores)


def _chunks(inputs: ScoreInputs) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices of whole blocks, about `CHUNK` tokens each, and their validity."""
    sparse_pass = inputs.sparse_pass
    size = sparse_pass.config.block_size
    chunk = max(1, CHUNK // size) * size
    for start in range(0, inputs.x.shape[1], chunk):
        part = slice(start, start + chunk)
        yield part, None if sparse_pass.valid is None else sparse_pass.valid[:, part]


def _whole(inputs: ScoreInputs, blocks: Tensor) -> Tensor:
    """``[B, N, ...]`` of the whole sequence; this process may have made only a part of it."""
    shards = inputs.sparse_pass.shards
    return blocks if shards is None else shards.gather_blocks(blocks)


POLICIES: dict[str, Callable[[ScoreInputs], Tensor]] = {
    "auto": auto,
    "overlap": overlap,
    "chunks": chunks,
    "recent": recent,
    "window": window,
    "random": random,
    "pooled": pooled,
    "oracle": oracle,
    "predictor": predictor,
}


def rank(inputs: ScoreInputs) -> Tensor:
    """Block scores ``[B, N]`` by the policy of the config."""
    policy = inputs.sparse_pass.config.policy
    assert policy is not None  # settled when the config was made
    return POLICIES[policy](inputs)


def _mlp_activity(inputs: ScoreInputs, rows: Tensor, normed: bool = False) -> Tensor:
    """Mean magnitude ``[B, R]`` of the MLP's intermediate activation for each row of ``[B, R, H]``.

    Experts have no single activation; for them it is that of the update which they make together.
    """
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        if inputs.family.intermediate is not None:
            down = inputs.layer.get_submodule(inputs.family.intermediate)
            handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            hooks.callback(handle.remove)
        hidden = rows if normed else sublayer_input(inputs, rows)
        for call in mlp_calls(inputs.layer, inputs.family):
            hidden = call(hidden)
    return (seen[0] if seen else hidden).float().abs().mean(-1)
