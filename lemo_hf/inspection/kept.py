"""Comparison of policies: what each keeps of one text, with or without a question about it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lemo_hf.config import LeMoConfig
from lemo_hf.core.checks import check_model
from lemo_hf.core.loss import shifted
from lemo_hf.core.policies import ScoreInputs, rank
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.inspection.layers import run_sparse_pass
from lemo_hf.inspection.row import Passage, TextRow
from lemo_hf.inspection.words import SharedBlock, shared_words
from lemo_hf.patch import input_device, transformers_model

# A row of fewer blocks shows nothing: its ends, which are always kept, are a good part of it.
FEW = 8
# Policies that look at the model's own queries and keys: each costs a pass.
OF_MODEL = ("pooled", "oracle", "predictor")
# Policies that leave a share of the blocks to chance.
MIXED = ("auto", "overlap", "predictor")


@dataclass(frozen=True)
class KeptRow:
    """The blocks that one policy keeps.

    Attributes:
        name: Name of the policy, and of the step if steps differ.
        policy: Policy, one of `lemo_hf.config.POLICIES`.
        kept: Kept blocks, ``[N]`` bool, in attention of the first sparse layer, and in all layers
            that agree.
        passages: Share of the tokens that is kept of each marked passage.
    """

    name: str
    policy: str
    kept: list[bool]
    passages: list[float]


@dataclass(frozen=True)
class KeptByPolicy:
    """What several policies keep of one row.

    Attributes:
        tokens: Length of the row.
        block_size: Tokens a block.
        retention: Share of the blocks that each policy keeps.
        question: Question at the end of the row; None: the row is labelled throughout.
        answer: Text of the labelled tokens, or None.
        passages: Marked passages.
        label_blocks: Label blocks, which all policies keep, ``[N]`` bool; none without a question.
        rows: Results, one for each policy and step.
        shared: Blocks of the text that share most words with the question, if there is one.
    """

    tokens: int
    block_size: int
    retention: float
    question: str | None
    answer: str | None
    passages: list[Passage]
    label_blocks: list[bool]
    rows: list[KeptRow]
    shared: list[SharedBlock]

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as a dictionary for JSON."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """The comparison in words."""
        return "\n".join([*self._head(), "", *self._table(), *self._words()]) + "\n"

    def _head(self) -> list[str]:
        blocks = len(self.label_blocks)
        lines = [
            f"{self.tokens:,} tokens in {blocks:,} blocks of {self.block_size}; "
            f"each policy keeps {percent(self.retention)} of them."
        ]
        if self.question is None:
            return [*lines, "All tokens have labels."]
        lines += [f"Question: {self.question}", f"Answer:   {self.answer}  (these tokens: labels)"]
        for passage in self.passages:
            at = f"tokens {passage.first:,}–{passage.last:,}"
            lines.append(f"Passage:  {passage.text}  ({at})")
        return lines

    def _table(self) -> list[str]:
        width = max(len(row.name) for row in self.rows)
        lines = []
        for row in self.rows:
            runs = sum(kept and not before for before, kept in pairwise([False, *row.kept]))
            marked = "".join(f", passage {kept_in_words(share)}" for share in row.passages)
            stretches = "stretch" if runs == 1 else "stretches"
            lines.append(
                f"{row.name:<{width}}  {sum(row.kept):>5} blocks in {runs} {stretches}{marked}"
            )
        return lines

    def _words(self) -> list[str]:
        if not self.shared:
            return []
        blocks = len(self.label_blocks)
        kept = next((row.kept for row in self.rows if row.policy == "overlap"), None)
        lines = ["", "What the text shares with the blocks that hold question and answer:"]
        for found in self.shared:
            fate = "" if kept is None else ", kept" if kept[found.block] else ", left out"
            words = ", ".join(
                f"'{words.text}' ({words.blocks:,} of {blocks:,} blocks)" for words in found.words
            )
            where = f"block {found.block:,}, tokens {found.first:,}–{found.last:,}{fate}"
            why = (
                f"shares {words}"
                if words
                else "shares no rare word itself, found through other blocks"
            )
            lines += ["", f"{where}: {why}", f"    {found.text}"]
        return lines


def percent(share: float) -> str:
    """``"30 %"``."""
    return f"{100 * share:.3g} %"


def kept_in_words(share: float) -> str:
    """``"kept"``, ``"left out"``, or ``"kept in part"``."""
    return "kept" if share == 1 else "kept in part" if share else "left out"


@torch.no_grad()
def compare_policies(
    model: nn.Module,
    tokenizer: Any,
    row: TextRow,
    config: LeMoConfig,
    policies: Sequence[str] | None = None,
    progress: bool = True,
) -> KeptByPolicy:
    """Compare what training would keep of ``row`` by several policies, at equal retention.

    Args:
        model: Causal LM or a PEFT model around one, without LeMo on it; unchanged afterwards. Only
            the policies `OF_MODEL` read more of it than its depth.
        tokenizer: Tokenizer that turns tokens into words.
        row: Row as `text_row` makes it.
        config: Settings, of which the first sparse layer's retention counts, and all that
            influences the choice.
        policies: Policies to compare, in this order; None: all that fit the row. If one is named
            again, it is shown at the next optimizer step, where chance draws anew.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: The row has fewer than `FEW` blocks, a threshold decides how much is kept, or
            model and config do not go together.
    """
    size, tokens = config.block_size, len(row.input_ids)
    if -(-tokens // size) < FEW:
        raise ValueError(
            f"the text has {tokens} tokens, fewer than {FEW} blocks of {size}: give more text, or "
            "a smaller block_size."
        )
    inner = transformers_model(model)
    family = check_model(inner)
    layers = cast(nn.ModuleList, inner.get_submodule(family.layers))
    index, retention = _first_sparse(config, len(layers))
    device = input_device(model)
    ids, labels = (torch.tensor([x], device=device) for x in (row.input_ids, row.labels))

    def pass_of(settings: LeMoConfig, number: int = 0, finish: bool = False) -> SparsePass:
        return SparsePass(
            settings,
            (1, tokens),
            device,
            input_ids=ids,
            targets=shifted(labels),
            global_step=number,
            retention=config.finish_retention if finish else None,
        )

    def scores_of(sparse_pass: SparsePass) -> Tensor:
        """Scores of a policy that does not read the stream."""
        stream = ids[..., None].float()
        return rank(
            ScoreInputs(layers[index], family, index, "attention", stream, None, sparse_pass, None)
        )

    def chosen(settings: LeMoConfig, number: int = 0, finish: bool = False) -> list[bool]:
        """The kept set of a pass, by such a policy."""
        sparse_pass = pass_of(settings, number, finish)
        rules = settings.layer_rules(len(layers))[index]
        assert rules is not None  # it is the first sparse layer
        kept = sparse_pass.choose(index, "attention", rules[0], lambda: scores_of(sparse_pass))
        return kept.blocks[0].tolist()

    rows: list[KeptRow] = []
    policies = _fitting(row, config) if policies is None else list(policies)
    for policy in tqdm(policies, desc="policies", disable=not progress):
        settings = _with_policy(config, policy, retention)
        number = sum(r.policy == policy for r in rows)
        name = f"{policy}, step {number + 1}" if policies.count(policy) > 1 else policy
        if policy in OF_MODEL:
            _, sets = run_sparse_pass(model, ids, settings, labels)
            kept = sets["attention"][index]
        else:
            kept = chosen(settings, number)
        rows.append(_row(row, name, policy, kept, size))
    asked = row.question is not None
    # Of its own accord a run spares rows that ask, see `SparsePass`.
    finishes = config.finish and not (asked and config.dense_finish is None)
    chosen_by_model = config.policy in OF_MODEL and config.finish_retention < 1
    if finishes and "chunks" in policies and not chosen_by_model:
        assert config.policy is not None  # settled when the config was made
        settings = _with_policy(config, config.policy, retention)
        kept = chosen(settings, finish=True)
        name = f"last {percent(config.finish)} of steps"
        place = 1 + max(i for i, r in enumerate(rows) if r.policy == "chunks")
        rows.insert(place, _row(row, name, config.policy, kept, size))
    sparse_pass = pass_of(
        dataclasses.replace(_with_policy(config, "overlap", retention), random_share=0)
    )
    return KeptByPolicy(
        tokens=tokens,
        block_size=size,
        retention=retention,
        question=row.question,
        answer=row.answer,
        passages=list(row.passages),
        label_blocks=sparse_pass.label_blocks[0].tolist(),
        rows=rows,
        shared=shared_words(sparse_pass, scores_of(sparse_pass), tokenizer.decode) if asked else [],
    )


def _fitting(row: TextRow, config: LeMoConfig) -> list[str]:
    """Policies to compare: first those that train such rows, then those that read the model, then
    chance."""
    asked = ["overlap"] if row.question is not None else []
    learned = ["predictor"] if config.predictor is not None else []
    return [*asked, *learned, *["chunks"] * 3, "pooled", "oracle", "recent", "window", "random"]


def _first_sparse(config: LeMoConfig, num_layers: int) -> tuple[int, float]:
    """The first sparse layer, whose kept set the others share if they agree, and the mean retention
    of all."""
    rules = {i: pair[0] for i, pair in enumerate(config.layer_rules(num_layers)) if pair}
    shares = [rule.retention for rule in rules.values() if rule.retention is not None]
    if not shares:
        raise ValueError(
            f"threshold={config.threshold} decides how much is kept, and policies are compared at "
            "one retention: set a retention and threshold=None."
        )
    return min(rules), round(sum(shares) / len(shares), 6)


def _with_policy(config: LeMoConfig, policy: str, retention: float) -> LeMoConfig:
    """``config`` with one kept set for all sparse layers, chosen by ``policy``."""
    changes: dict[str, Any] = {} if policy in MIXED else {"random_share": 0.0}
    if policy != "predictor":
        changes |= {"predictor": None, "predictor_revision": None}
    return dataclasses.replace(
        config,
        policy=policy,
        retention=retention,
        finish_retention=1.0,  # the mean of layers may be more than the finish keeps
        mlp_retention=None,
        mlp_threshold=None,
        agree_across_layers=True,
        **changes,
    )


def _row(row: TextRow, name: str, policy: str, kept: list[bool], size: int) -> KeptRow:
    shares = []
    for passage in row.passages:
        inside = [kept[i // size] for i in range(passage.first, passage.last + 1)]
        shares.append(sum(inside) / len(inside))
    return KeptRow(name, policy, kept, shares)
