"""What one forward pass knows about its batch, and what its layers keep of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lemo_hf.config import KeepRule, LeMoConfig
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.predictors.training_free import row_keys
from lemo_hf.row_counts import Counts, RowCounts
from lemo_hf.selection import (
    KeptSet,
    LayerRows,
    block_any,
    blocks_above,
    keep_blocks,
    kept_set,
    num_kept_blocks,
)
from lemo_hf.sequence_parallel import Shards, Share

# Labels that leave out no more than this (first tokens of packed documents, an end-of-text token
# that is masked like padding) still count as labels on the whole sequence.
WHOLE_SEQUENCE = 0.9


@dataclass(frozen=True)
class Seen:
    """What a pass that ended has kept.

    Attributes:
        real_tokens: Of the batch that are no padding.
        real_blocks: ``[B, N]`` bool: blocks with such tokens.
        kept_tokens: Token-layers of "attention" and "mlp", int64 scalars.
        kept_blocks: ``[B, N]`` bool by ``(layer, "attention" or "mlp")``.
    """

    real_tokens: int
    real_blocks: Tensor
    kept_tokens: dict[str, Tensor | int]
    kept_blocks: dict[tuple[int, str], Tensor]

    def clone(self) -> "Seen":
        """The same in other memory; sets that layers share are one there too."""
        sets = {id(blocks): blocks.clone() for blocks in self.kept_blocks.values()}
        return Seen(
            self.real_tokens,
            self.real_blocks.clone(),
            {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.kept_tokens.items()},
            {key: sets[id(blocks)] for key, blocks in self.kept_blocks.items()},
        )


class Step:
    """One forward pass: padding, documents, required blocks, and the kept sets chosen so far.

    Args:
        config: The user's choice.
        input_ids: ``[B, T]``, or None if the model was given ``inputs_embeds``.
        shape: ``(B, T)``.
        device: Of the batch.
        attention_mask: ``[B, T]`` (1 = token, 0 = padding), a 4-D mask, or None.
        position_ids: ``[B, T]`` or ``[1, T]`` as the caller gave them, or None. Where they restart,
            and no attention mask is given, a new document begins: transformers' own rule.
        targets: ``[B, T]`` token each position must predict, `IGNORE_INDEX` for none; or None.
        global_step: Optimizer steps done, int64 scalar tensor or int; varies the random policy.
        score_always: Score blocks even where there is nothing to choose, as other processes may
            have to, and scoring gathers parameters that all of them hold parts of.
        shards: How processes share the sequence, if they do; all else here is of the whole of it.
        rows: Counts of each row, where the host knows them already.
    """

    # The loss reads the stream itself, so that its gradient may be updated in place as it comes.
    owns_gradient = False

    def __init__(
        self,
        config: LeMoConfig,
        shape: tuple[int, int],
        device: torch.device,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        targets: Tensor | None = None,
        global_step: Tensor | int = 0,
        score_always: bool = False,
        shards: Shards | None = None,
        rows: list[RowCounts] | None = None,
    ):
        self.config = config
        self.batch, self.tokens = shape
        self.device = device
        self.global_step = global_step
        self.score_always = score_always
        self.shards = shards
        self.num_blocks = -(-self.tokens // config.block_size)
        self.valid: Tensor | None = None
        if attention_mask is not None and attention_mask.dim() == 2:
            self.valid = attention_mask.bool()
        self.documents = None
        if position_ids is not None and attention_mask is None:
            restarts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
            self.documents = restarts.cumsum(1).expand(self.batch, -1)
        self._input_ids = input_ids
        self.real, self.required, table = self._blocks(targets)
        self._counts = Counts(table, rows)
        self._tokens = self._counts.on_device[:, :1]
        self.agreed: dict[str, KeptSet] = {}
        self.times_kept = torch.zeros(shape, dtype=torch.int32, device=device)
        self.kept_tokens: dict[str, Tensor | int] = {"attention": 0, "mlp": 0}
        self.kept_blocks: dict[tuple[int, str], Tensor] = {}
        self.level: str | None = None  # of recomputation, once a layer asks
        self.exceeded: str | None = None  # why a row keeps more than its budget

    @cached_property
    def keys(self) -> Tensor:
        """What the random policy tells rows apart by, ``[B]`` int64: their tokens or place."""
        if self._input_ids is None:
            return torch.arange(self.batch, device=self.device)
        return row_keys(self._input_ids, self.valid)

    @cached_property
    def middles(self) -> Tensor:
        """The position in the middle of each block: ``[1, N]``, or ``[B, N]`` if rows are padded.

        In a block that is cut short it is a token's, whether the row ends there or padding begins.
        """
        size = self.config.block_size
        middles = torch.arange(self.num_blocks, device=self.device)[None] * size + size // 2
        if self.valid is None:
            return middles.clamp_max(self.tokens - 1)
        first = self.valid.int().argmax(1, keepdim=True)
        last = self.tokens - 1 - self.valid.flip(1).int().argmax(1, keepdim=True)
        return middles.clamp(first, last)

    @cached_property
    def block_documents(self) -> Tensor | None:
        """The document of each block's middle, ``[B, N]``; None if rows are not packed."""
        if self.documents is None:
            return None
        return torch.take_along_dim(self.documents, self.middles, 1)

    @property
    def rows(self) -> list[RowCounts]:
        """Counts of each row. The host waits for them once, and never for what layers compute."""
        return self._counts.on_host

    @property
    def owns_embeddings(self) -> bool:
        """Nobody else holds the first layer's input, which may then be updated in place."""
        return self._input_ids is not None

    @property
    def real_tokens(self) -> int:
        """Tokens of the batch that are no padding."""
        return sum(row.tokens for row in self.rows)

    @cached_property
    def everything(self) -> KeptSet:
        """All positions, for a layer that is dense."""
        index = torch.arange(self.tokens, device=self.device).expand(self.batch, -1).contiguous()
        return KeptSet(index, None, self._tokens.sum(), self.real, whole=True, cache={})

    def _blocks(self, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks with tokens ``[B, N]``, blocks always kept ``[B, N]``, and each row's counts."""
        size = self.config.block_size
        valid = self.valid
        if valid is None:
            valid = torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device)
        real = block_any(valid, size)
        first = real & (real.cumsum(1) == 1)
        last = real & (real.flip(1).cumsum(1).flip(1) == 1)
        required = first | last
        label_blocks, labels = torch.zeros_like(required), torch.zeros_like(required)
        if targets is not None:
            labels = targets != IGNORE_INDEX
            predicts = labels & valid
            answers = torch.nn.functional.pad(predicts[:, :-1], (1, 0)) & valid
            partial = predicts.sum(1) < WHOLE_SEQUENCE * (valid.sum(1) - 1)
            label_blocks = block_any(predicts | answers, size) & partial[:, None]
            required = required | label_blocks
        in_required = required.repeat_interleave(size, 1)[:, : self.tokens] & valid
        counts = [valid, real, required, in_required, label_blocks, labels]
        return real, required, torch.stack([count.sum(1) for count in counts], 1)

    def seen(self) -> Seen:
        """What layers have kept, once all have chosen."""
        return Seen(self.real_tokens, self.real, self.kept_tokens, self.kept_blocks)

    def share(self, kept: KeptSet) -> Share | None:
        """Who works on which rows of ``kept``; None where no other process does."""
        return None if self.shards is None else self.shards.share(kept)

    def choose(
        self,
        layer_index: int,
        sublayer: str,
        rule: KeepRule,
        score: Callable[[], Tensor],
        shared: bool = False,
    ) -> KeptSet:
        """The rows that ``sublayer`` ("attention" or "mlp") of a layer keeps.

        Args:
            layer_index: Of the layer that asks.
            sublayer: Layers that agree look for the set of this name first.
            rule: How many of each row's blocks.
            score: Called only if something is left to choose (but see ``score_always``):
                ``[B, N]`` block scores.
            shared: The MLP keeps the same rows, and is counted with them.
        """
        kept = self.agreed.get(sublayer)
        if kept is None:
            kept = self._choose(rule, score)
            if self.config.agree_across_layers:
                self.agreed[sublayer] = kept
        for name in ("attention", "mlp") if shared else (sublayer,):
            self.kept_tokens[name] = self.kept_tokens[name] + kept.kept_tokens
            self.kept_blocks[layer_index, name] = kept.blocks
        return kept

    def stored_rows(self, num_layers: int) -> Iterator[LayerRows]:
        """Of each layer of the model, in the whole batch; this process's, where several share it.

        Known before a layer has chosen. Layers that thresholds choose for may keep every row.
        """
        for rule in self.config.layer_rules(num_layers):
            attention, mlp = (None, None) if rule is None else rule
            yield self._rows_of(attention), None if mlp is None else self._rows_of(mlp)

    def _rows_of(self, rule: KeepRule | None) -> int:
        if rule is None or rule.retention is None:
            rows = self.batch * self.tokens
        else:
            rows = self.batch * max(1, *self._slots(rule.retention))
        return rows if self.shards is None else -(-rows // self.shards.group.size)

    def _choose(self, rule: KeepRule, score: Callable[[], Tensor]) -> KeptSet:
        if rule.threshold is None:
            assert rule.retention is not None  # one of the two is set
            blocks, slots, exact = self._best(rule.retention, score)
            tokens = self._tokens_of(blocks)
        else:
            blocks = self.real
            if rule.threshold > 0:
                blocks = blocks_above(score(), self.real, self.required, rule.threshold)
            tokens = self._tokens_of(blocks)
            # The scores fix how many slots there are, so the host waits for them at each choice.
            slots, exact = tokens.sum(1).tolist(), True
        self.times_kept += tokens
        num_slots = max(1, *slots)
        exact &= all(n == num_slots for n in slots)
        return kept_set(tokens, blocks, num_slots, exact, shared=self.config.agree_across_layers)

    def _tokens_of(self, blocks: Tensor) -> Tensor:
        """``[B, N]`` bool to the tokens ``[B, T]`` in them that are no padding."""
        tokens = blocks.repeat_interleave(self.config.block_size, 1)[:, : self.tokens]
        return tokens if self.valid is None else tokens & self.valid

    def _best(
        self, retention: float, score: Callable[[], Tensor]
    ) -> tuple[Tensor, list[int], bool]:
        """The best share of blocks ``[B, N]``, each row's slots, and whether it fills them all."""
        budgets = [row.num_blocks(retention) for row in self.rows]
        self._note_excess(retention)
        everything = all(k == row.blocks for k, row in zip(budgets, self.rows, strict=True))
        if retention == 1 or (everything and not self.score_always):
            blocks = self.real
        else:
            blocks = keep_blocks(score(), self.real, self.required, self._column(budgets))
        exact = all(
            row.tokens == row.most_tokens(row.blocks, self.config.block_size) for row in self.rows
        )
        return blocks, self._slots(retention), exact

    def _slots(self, retention: float) -> list[int]:
        """That each row needs."""
        size = self.config.block_size
        return [
            min(row.tokens, row.most_tokens(row.num_blocks(retention), size)) for row in self.rows
        ]

    def _column(self, numbers: list[int]) -> Tensor | int:
        """``[B, 1]`` on the device, or the number that all of them are."""
        if len(set(numbers)) == 1:
            return numbers[0]
        # Filled where they are needed: nothing is copied, which the host or a graph would wait for.
        return torch.stack([torch.full((1,), n, device=self.device) for n in numbers])

    def _note_excess(self, retention: float) -> None:
        for index, row in enumerate(self.rows):
            budget = num_kept_blocks(retention, row.blocks)
            if row.label_blocks > budget:
                self.exceeded = (
                    f"row {index} has labels in {row.label_blocks} of its {row.blocks} blocks, "
                    f"more than retention {retention:g} allows ({budget}): "
                    "all blocks with labels are kept"
                )

    def supervised(self) -> Tensor:
        """Tokens kept at least as often as the average token of their row: ``[B, T]`` bool."""
        mean = self.times_kept.sum(1, keepdim=True) / self._tokens.clamp_min(1)
        supervised = self.times_kept >= mean
        return supervised if self.valid is None else supervised & self.valid

    @property
    def most_labels(self) -> int | None:
        """No more tokens than this have a label that is asked for; None if only the device knows.

        Where processes share the sequence, of the tokens that this one holds.

        That is so where layers choose sets of their own, and tokens kept most often are asked.
        """
        labels = sum(row.labels for row in self.rows)
        if self.config.supervise == "all":
            return labels
        if set(self.agreed) != {"attention"}:
            return None
        kept = self.agreed["attention"]
        slots = (self.share(kept) or kept).index.shape[1]
        return sum(min(row.labels, slots) for row in self.rows)
