"""What is known of a batch before any layer has chosen: padding, documents, labels, counts."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lemo_hf.batch.images import block_groups, together
from lemo_hf.batch.pairs import partners
from lemo_hf.batch.row_counts import Counts, RowCounts
from lemo_hf.batch.selection import block_any
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.predictors.training_free import Places, row_keys

# Labels that leave out no more than this (first tokens of packed documents, an end-of-text token
# that is masked like padding) still count as labels on the whole sequence.
WHOLE_SEQUENCE = 0.9


def outside(targets: Tensor, vocabulary: int | None) -> Tensor:
    """``[B, T]`` bool: whether a target of ``targets [B, T]`` is neither a token nor ignored."""
    wrong = (targets < 0) & (targets != IGNORE_INDEX)
    return wrong if vocabulary is None else wrong | (targets >= vocabulary)


def covers_a_part(labels: Any, tokens: Any) -> Any:
    """Whether so many labels, those of a first token left out, cover only a part of a row of so
    many tokens: a truth value, or one a row."""
    return labels < WHOLE_SEQUENCE * (tokens - 1)


def position_ids_of(kwargs: dict[str, Any], tokens: int) -> Tensor | None:
    """Position ids that the caller of a model gave, or that its document boundaries imply."""
    bounds = kwargs.get("cu_seq_lens_q")
    if kwargs.get("position_ids") is not None or bounds is None:
        return kwargs.get("position_ids")
    positions = torch.arange(tokens, device=bounds.device)
    starts = bounds[torch.searchsorted(bounds, positions.to(bounds.dtype), right=True) - 1]
    return (positions - starts)[None]


class BatchFacts:
    """Padding, documents, blocks and labels of a batch.

    Args:
        block_size: Tokens a block.
        shape: ``(B, T)``.
        device: Device of the batch.
        input_ids: ``[B, T]``, or None if the model was given ``inputs_embeds``.
        attention_mask: ``[B, T]`` (1 = token, 0 = padding), a 4-D mask, or None.
        position_ids: ``[B, T]`` or ``[1, T]`` as the caller gave them, or None. Where they restart,
            and no attention mask is given, a new document begins: transformers' own rule.
        targets: ``[B, T]`` token that each position must predict, `IGNORE_INDEX` for none; or None.
            Targets of padding, and targets that are no token, do not count.
        vocabulary: Size of the vocabulary; None: labels outside it are not counted.
        rows: Counts of each row, if the host knows them already.
        pairs: Whether rows i and B/2 + i are two answers to one prompt. They then keep the same
            blocks of the prompt, and answers are kept whole however short the prompt is.
        images: ``[B, T]`` bool: tokens of images, each of which is kept whole or left out; None:
            there are none.

    Attributes:
        valid: ``[B, T]`` bool, False at padding; None without padding.
        documents: ``[B, T]`` ascending document ids; None if rows are not packed.
        real: ``[B, N]`` bool: blocks with tokens.
        required: ``[B, N]`` bool: blocks that are kept whatever their score: the first and the last
            of each document, label blocks, one with something to predict in each document that has
            any, and all blocks of an image that reaches into one of these.
        groups: ``[B, N]`` int64: blocks with one number are kept together; None: each stands alone.
        row_tokens: ``[B, 1]`` int64: number of each row's tokens without padding.
        label_blocks: ``[B, N]`` bool: blocks with labels, in rows whose labels cover a part; in
            pairs, in all rows.
    """

    def __init__(
        self,
        block_size: int,
        shape: tuple[int, int],
        device: torch.device,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        targets: Tensor | None = None,
        vocabulary: int | None = None,
        rows: list[RowCounts] | None = None,
        pairs: bool = False,
        images: Tensor | None = None,
    ):
        self.pairs = pairs
        self.block_size, self.vocabulary = block_size, vocabulary
        self.batch, self.tokens = shape
        self.device = device
        self.num_blocks = -(-self.tokens // block_size)
        self.valid: Tensor | None = None
        if attention_mask is not None and attention_mask.dim() == 2:
            self.valid = attention_mask.bool()
        self.documents = None
        if position_ids is not None and attention_mask is None:
            restarts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
            self.documents = restarts.cumsum(1).expand(self.batch, -1)
        self.input_ids = input_ids
        valid = self.valid
        if valid is None:
            valid = torch.ones(shape, dtype=torch.bool, device=device)
        self.real = block_any(valid, block_size)
        self.groups = None if images is None else block_groups(images & valid, block_size)
        self.required, self.label_blocks, table = self._blocks(valid, targets, vocabulary)
        if pairs:
            table = torch.cat([table, self._apart(valid).sum(1, keepdim=True)], 1)
        self._counts = Counts(table, rows)
        self.row_tokens = self._counts.on_device[:, :1]

    @cached_property
    def keys(self) -> Tensor:
        """``[B]`` int64 keys by which random policies tell rows apart: made of their tokens or
        place."""
        if self.input_ids is None:
            keys = torch.arange(self.batch, device=self.device)
        else:
            keys = row_keys(self.input_ids, self.valid)
        return keys[: self.batch // 2].repeat(2) if self.pairs else keys

    @cached_property
    def middles(self) -> Tensor:
        """The position in the middle of each block: ``[1, N]``, or ``[B, N]`` if rows are padded.

        In a block that is cut short by padding or the row's end, it is still the position of a
        token.
        """
        size = self.block_size
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

    @cached_property
    def places(self) -> Places:
        """The place of each block within its document."""
        return Places.of(self.real, self.block_documents)

    @cached_property
    def prompt(self) -> Tensor:
        """In pairs: blocks that hold only prompt, ``[B, N]`` bool, the same in both rows."""
        prompt = self.real & ~self.label_blocks
        return prompt & partners(prompt)

    @cached_property
    def asks(self) -> Tensor:
        """Rows whose labels cover only a part of them, ``[B, 1]`` bool."""
        return self.label_blocks.any(1, keepdim=True)

    @cached_property
    def asking_blocks(self) -> Tensor:
        """Asking blocks, for which others are kept, ``[B, N]`` bool: label blocks in rows whose
        labels cover a part, else all."""
        return torch.where(self.asks, self.label_blocks, self.real)

    @cached_property
    def asking_tokens(self) -> Tensor:
        """Tokens of label blocks and of the block before each, where a question may stand:
        ``[B, T]`` bool; none in a row that is labelled throughout."""
        before = self.label_blocks & (self.places.place > 0)
        before = torch.nn.functional.pad(before[:, 1:], (0, 1))
        return self.tokens_of((self.label_blocks | before) & self.real)

    @property
    def rows(self) -> list[RowCounts]:
        """Counts of each row. The host waits for them once, and never for a layer's results."""
        return self._counts.on_host

    @property
    def owns_embeddings(self) -> bool:
        """Whether only LeMo holds the first layer's input, so that it may be updated in place."""
        return self.input_ids is not None

    @property
    def real_tokens(self) -> int:
        """Number of the batch's tokens without padding."""
        return sum(row.tokens for row in self.rows)

    def check_labels(self, targets: Tensor) -> None:
        """Raises ValueError if a target of ``targets [B, T]`` of this batch is neither a token nor
        ignored.

        The host has the counts once a layer has chosen, so it does not wait for this check.
        """
        wrong = sum(row.wrong_labels for row in self.rows)
        if wrong:
            label = int(targets[outside(targets, self.vocabulary)][0])
            raise ValueError(
                f"{wrong} labels of the batch are not among the {self.vocabulary} tokens of the "
                f"model, the first of them is {label}. Set labels that are to be ignored to "
                f"{IGNORE_INDEX}; for added tokens call model.resize_token_embeddings first."
            )

    def check_pairs(self) -> None:
        """Raises ValueError if the rows of a pair have different prompts, without a further wait of
        the host."""
        for index, row in enumerate(self.rows):
            if row.apart:
                raise ValueError(
                    f"row {index} of {self.batch} has a partner half a batch away, and "
                    f"{row.apart} tokens of their prompts differ, or are padding before them. "
                    "Both must begin with the same tokens: pad on the right, and cut rows with "
                    "truncation_mode='keep_start'."
                )

    def _apart(self, valid: Tensor) -> Tensor:
        """Tokens of the prompt that differ from the partner's, and padding before a token:
        ``[B, T]`` bool."""
        prompt = self.prompt.repeat_interleave(self.block_size, 1)[:, : self.tokens]
        left = ~valid & valid.flip(1).cummax(1).values.flip(1)
        if self.input_ids is None:
            return left
        return left | ((self.input_ids != partners(self.input_ids)) & prompt)

    def _blocks(
        self, valid: Tensor, targets: Tensor | None, vocabulary: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks that are always kept, and label blocks, ``[B, N]`` each; and each row's counts."""
        size, real = self.block_size, self.real
        documents = self.block_documents
        if documents is None:
            first = real & (real.cumsum(1) == 1)
            last = real & (real.flip(1).cumsum(1).flip(1) == 1)
        else:  # no row is padded then
            first = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
            last = documents.diff(dim=1, append=documents[:, -1:] + 1) != 0
        required = first | last
        label_blocks = torch.zeros_like(required)
        predicts = wrong = torch.zeros_like(valid)
        if targets is not None:
            predicts = (targets >= 0) & valid
            wrong = outside(targets, vocabulary)
            answers = torch.nn.functional.pad(predicts[:, :-1], (1, 0)) & valid
            label_blocks = block_any(predicts | answers, size)
            if not self.pairs:
                partial = covers_a_part(predicts.sum(1), valid.sum(1))
                label_blocks = label_blocks & partial[:, None]
            required = self._with_something_to_predict(
                required | label_blocks, block_any(predicts, size)
            )
        if self.groups is not None:
            required = together(required, self.groups)
        in_required = required.repeat_interleave(size, 1)[:, : self.tokens] & valid
        counts = [valid, real, required, in_required, label_blocks, predicts, wrong]
        return required, label_blocks, torch.stack([count.sum(1) for count in counts], 1)

    def _with_something_to_predict(self, required: Tensor, predicting: Tensor) -> Tensor:
        """``required``, and the last of the ``predicting`` blocks of each document of which none is
        required: ``[B, N]`` bool each. A set without one would teach nothing."""
        order = torch.arange(1, self.num_blocks + 1, device=self.device)
        order = (order + self.num_blocks * required) * predicting  # required ones come after all
        if self.documents is None:
            latest = order.amax(1, keepdim=True)
        else:
            document = self.places.document
            latest = torch.zeros_like(order).scatter_reduce(1, document, order, "amax")
            latest = latest.gather(1, document)
        return required | (predicting & (order == latest))

    def tokens_of(self, blocks: Tensor) -> Tensor:
        """``[B, T]`` bool: tokens, without padding, in the given blocks ``[B, N]`` bool."""
        tokens = blocks.repeat_interleave(self.block_size, 1)[:, : self.tokens]
        return tokens if self.valid is None else tokens & self.valid
