"""Batches whose padding is labelled, or that are padding alone."""

import torch

from support.models import batch


def left_padded():
    inputs = batch(rows=3)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :9], mask[2, :25] = 0, 0
    inputs["labels"][mask == 0] = -100
    return {**inputs, "attention_mask": mask}


def with_a_row_of_padding():
    """Which has labels all the same."""
    inputs = batch(rows=3)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1] = 0
    return {**inputs, "attention_mask": mask}


def without_those_of_padding(inputs):
    """The same batch, its labels none that padding would have to predict."""
    labels = inputs["labels"].clone()
    labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100
    return {**inputs, "labels": labels}
