"""Rows of many lengths, and their collator."""

import torch

from support.trainers import dataset

LENGTHS = [37, 64, 5, 51, 90, 23]


def ragged(rows=32):
    """Rows of many lengths, most of them no multiple of a block."""
    long = dataset(rows, tokens=max(LENGTHS))
    cut = [LENGTHS[i % len(LENGTHS)] for i in range(rows)]
    return [{k: v[:n] for k, v in row.items()} for row, n in zip(long, cut, strict=True)]


class Padded:
    """Pads on one side to the longest row; nothing predicts a row's first token."""

    def __init__(self, side="right"):
        self.side = side

    def __call__(self, rows):
        widest = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        columns = {name: [] for name in fills}
        for row in rows:
            row = {**row, "attention_mask": [1] * len(row["input_ids"])}
            row["labels"] = [-100, *row["labels"][1:]]
            for name, fill in fills.items():
                padding = [fill] * (widest - len(row[name]))
                left = self.side == "left"
                columns[name].append(padding + row[name] if left else row[name] + padding)
        return {name: torch.tensor(column) for name, column in columns.items()}
