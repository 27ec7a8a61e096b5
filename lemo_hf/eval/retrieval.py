"""Retrieval: can a model repeat a line that it read far above?"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from lemo_hf.eval.needles import NeedleRow
from lemo_hf.modes import evaluating
from lemo_hf.patch import input_device, transformers_model

MEASURES = {
    "accuracy": "answers right",
    "token_accuracy": "answer tokens right",
    "log_probability": "log-probability of the answer, nats",
}


@dataclass(frozen=True)
class Retrieval:
    """How well a model retrieves.

    Attributes:
        cells: Measures for each length and depth, in this order: ``length`` in tokens, ``depth``,
            ``samples`` (rows), ``accuracy`` (share of answers that greedy generation gives in
            full), ``token_accuracy`` (share of answer tokens that are its choice, given the answer
            before them), ``log_probability`` (nats of a whole answer, mean over rows).
    """

    cells: list[dict[str, Any]]

    @property
    def lengths(self) -> list[int]:
        """Lengths of the rows, ascending."""
        return sorted({cell["length"] for cell in self.cells})

    @property
    def depths(self) -> list[float]:
        """Depths of the needles, ascending."""
        return sorted({cell["depth"] for cell in self.cells})

    def grid(self, measure: str = "accuracy") -> list[list[float | None]]:
        """Values of a measure, ``[depths][lengths]``; None where nothing was asked.

        Args:
            measure: Name of the measure, one of `MEASURES`.
        """
        values = {(cell["length"], cell["depth"]): cell[measure] for cell in self.cells}
        return [[values.get((length, depth)) for length in self.lengths] for depth in self.depths]

    def mean(self, measure: str = "accuracy", **where: Any) -> float:
        """Mean over all cells, or over those with the given values (``length=4096``); each cell
        counts the same."""
        values = [
            cell[measure]
            for cell in self.cells
            if all(cell[name] == value for name, value in where.items())
        ]
        return sum(values) / len(values)

    def to_dict(self) -> dict[str, Any]:
        """The means over all cells, and the cells, as a dictionary for JSON."""
        return {**{measure: self.mean(measure) for measure in MEASURES}, "cells": self.cells}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Retrieval":
        """The result that `to_dict` wrote."""
        return cls(values["cells"])

    def format_table(self, measure: str = "accuracy") -> str:
        """A table in plain text: a line for each depth, a column for each length, and the means.

        Args:
            measure: Name of the measure, one of `MEASURES`.
        """
        lines = [["depth", *(f"{length:,}" for length in self.lengths), "mean"]]
        for depth, values in zip(self.depths, self.grid(measure), strict=True):
            lines.append(
                [f"{depth:.2f}", *map(_cell, values), _cell(self.mean(measure, depth=depth))]
            )
        means = [_cell(self.mean(measure, length=length)) for length in self.lengths]
        lines.append(["mean", *means, _cell(self.mean(measure))])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        samples = sorted({cell["samples"] for cell in self.cells})
        count = str(samples[0]) if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
        title = f"{MEASURES[measure]}, by depth and by length in tokens ({count} rows each)"
        table = ["  ".join(map(str.rjust, line, widths)) for line in lines]
        return "\n".join([title, *table])


@torch.no_grad()
def retrieval(
    model: nn.Module, rows: Sequence[NeedleRow], *, batch_size: int = 1, progress: bool = True
) -> Retrieval:
    """Ask the model all questions.

    The model reads prompt and answer in one dense pass. An answer is right if each of its tokens is
    the most probable one after the prompt and the answer before it. Exactly then greedy generation
    from the prompt begins with the answer (up to rounding differences of the passes). Only the
    answer's logits exist, ``[batch_size, answer, V]``.

    Processes (``accelerate launch``, ``torchrun``) share the rows, and each gets the whole result.

    Args:
        model: Causal LM or a PEFT model around one, on its device, not wrapped for training. It
            runs in evaluation mode and is unchanged afterwards.
        rows: Rows as `needle_rows` makes them, the same in every process.
        batch_size: Number of rows of one length that are run together.
        progress: Whether a progress bar is shown.

    Returns:
        Measures for each length and depth.

    Raises:
        ValueError: There is no row, or the model does not support ``logits_to_keep``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not rows:
        raise ValueError("there is no row to answer: make some with needle_rows.")
    inner = transformers_model(model)
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"{type(inner).__name__} does not take logits_to_keep: use a causal LM of transformers "
            "(unwrapped, if it was prepared for training)."
        )
    device = input_device(model)
    state = PartialState()
    batches = _batches(rows, batch_size)
    outcomes = torch.zeros(len(rows), 3, dtype=torch.float64)
    quiet = not (progress and state.is_main_process)
    with (
        evaluating(model),
        tqdm(total=len(batches), desc="retrieval", unit="batch", disable=quiet) as bar,
    ):
        for start in range(0, len(batches), state.num_processes):
            number = start + state.process_index
            # With sharded weights every process must take part in every pass, needed or not.
            batch = batches[min(number, len(batches) - 1)]
            answers = _answers(model, [rows[i] for i in batch], device)
            if number < len(batches):
                outcomes[batch] = answers.double().cpu()
            bar.update(min(state.num_processes, len(batches) - start))
    outcomes = reduce(outcomes.to(state.device), "sum").cpu()
    return Retrieval(_cells(rows, outcomes))


def _answers(model: nn.Module, rows: list[NeedleRow], device: torch.device) -> Tensor:
    """``[rows, 3]``: whether the answer is right, the number of its right tokens, and its
    log-probability in nats."""
    ids = torch.tensor([row.input_ids for row in rows], device=device)
    counts = torch.tensor([row.answer_tokens for row in rows], device=device)
    longest = max(row.answer_tokens for row in rows)
    # The last token of the answer has nothing to predict any more.
    output = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=longest)
    logits, targets = output.logits.float(), ids[:, -longest:]
    asked = torch.arange(longest, device=device) >= longest - counts[:, None]
    right = (logits.argmax(-1) == targets) & asked
    nats = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].where(asked, 0)
    return torch.stack([right.sum(1) == counts, right.sum(1), nats.sum(1)], 1)


def _batches(rows: Sequence[NeedleRow], batch_size: int) -> list[list[int]]:
    """Indices of rows of one length, the longest first, so that too little memory shows early."""
    of_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        of_length.setdefault(len(row.input_ids), []).append(i)
    return [
        numbers[start : start + batch_size]
        for _, numbers in sorted(of_length.items(), reverse=True)
        for start in range(0, len(numbers), batch_size)
    ]


def _cells(rows: Sequence[NeedleRow], outcomes: Tensor) -> list[dict[str, Any]]:
    of_cell: dict[tuple[int, float], list[int]] = {}
    for i, row in enumerate(rows):
        of_cell.setdefault((len(row.input_ids), row.depth), []).append(i)
    cells = []
    for (length, depth), numbers in sorted(of_cell.items()):
        right, tokens, nats = outcomes[numbers].sum(0).tolist()
        cells.append(
            {
                "length": length,
                "depth": depth,
                "samples": len(numbers),
                "accuracy": right / len(numbers),
                "token_accuracy": tokens / sum(rows[i].answer_tokens for i in numbers),
                "log_probability": nats / len(numbers),
            }
        )
    return cells


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
