"""Loss and gradients of one pass under a config, and their comparison."""

import torch

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from support.models import batch


def run(model, **options):
    """Loss, and the gradients by name."""
    model.zero_grad()
    apply_lemo(model, LeMoConfig(block_size=16, policy="recent", **options))
    torch.manual_seed(0)
    try:
        loss = model(**batch(2, 96)).loss
        loss.backward()
    finally:
        remove_lemo(model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=0)
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        torch.testing.assert_close(grad, b[1][name], rtol=1e-4, atol=1e-6, msg=name)
