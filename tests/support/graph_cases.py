"""Small models with CUDA graphs, their rows, and what both are compared by."""

from dataclasses import replace

import pytest
import torch

from lemo_hf import apply_lemo
from support.models import make_model, with_lora
from support.trainers import SPARSE

STEPS = 5  # as ever, recorded, replayed thrice
gpu = pytest.mark.gpu


def graphs_of(model):
    """How many graphs there are for ``model``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return len(vars(base)["_call_impl"].__func__.args[1].args[0]._graphs)


def tiny(device, family="llama", lora=True, **options):
    model = make_model(family, "sdpa", **options)
    return (with_lora(model) if lora else model).to(device)


def batches(device, tokens=70, rows=2, steps=STEPS):
    torch.manual_seed(3)
    ids = torch.randint(3, 97, (steps, rows, tokens)).to(device)
    return [{"input_ids": x, "labels": x} for x in ids]


def with_twin(device, config=SPARSE):
    """One model with graphs, and one without."""
    model, twin = tiny(device), tiny(device)
    apply_lemo(model, replace(config, cuda_graphs=True))
    apply_lemo(twin, config)
    return model, twin


def assert_same_gradients(model, twin):
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
