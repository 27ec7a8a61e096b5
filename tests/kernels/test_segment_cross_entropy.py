"""The segment loss, its gradients, and what it never makes."""

import pytest
import torch
from support.grids import covering
from support.parity import DTYPES, assert_as_good
from torch import nn

from lemo_hf.kernels.segment_cross_entropy import (
    IGNORE_INDEX,
    choose_segment_size,
    plain_weight,
    segment_cross_entropy,
)


def inputs(rows, hidden_size, vocabulary, dtype, device, ignored=0.4):
    hidden = torch.randn(rows, hidden_size).to(device, dtype)
    weight = torch.randn(vocabulary, hidden_size).to(device, dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[torch.rand(rows) < ignored] = IGNORE_INDEX
    return hidden, weight, targets.to(device), (torch.rand(rows) + 0.5).to(device)


def plain(hidden, weight, targets, weights, dtype, divisor, softcap):
    """The loss with all logits at once, and its gradients."""
    hidden, weight = (part.detach().to(dtype).requires_grad_() for part in (hidden, weight))
    logits = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32)) / divisor
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    loss = (nll * weights).sum() / 7
    return loss, *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize(
    ("dtype", "segment_size", "scaled", "as_module"),
    covering(
        DTYPES,
        [1, 7, None],
        [(1.0, None), (2.5, None), (1.0, 3.0), (2.0, 4.0)],  # divisor and softcap
        [False, True],
    ),
)
def test_loss_and_gradients(dtype, segment_size, scaled, as_module, device):
    divisor, softcap = scaled
    hidden, weight, targets, weights = inputs(23, 6, 31, dtype, device)
    options = dict(divisor=divisor, softcap=softcap)
    leaf = hidden.detach().requires_grad_()
    if as_module:
        head = nn.Linear(6, 31, bias=False, dtype=dtype, device=device)
        head.weight = nn.Parameter(weight)
        parameter = head.weight
    else:
        parameter = weight.detach().requires_grad_()

        def head(rows):
            return rows @ parameter.T

    loss = segment_cross_entropy(
        leaf,
        targets,
        weights,
        head,
        segment_size=segment_size,
        parameters=[parameter],
        **options,
    )
    gradients = torch.autograd.grad(loss / 7, (leaf, parameter))
    for values in zip(
        (loss / 7, *gradients),
        plain(hidden, weight, targets, weights, torch.float64, **options),
        plain(hidden, weight, targets, weights, dtype, **options),
        strict=True,
    ):
        assert_as_good(*values)
    assert (gradients[0][targets == IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize("label", [-1, 31, 40])
def test_a_label_that_is_no_token_has_no_loss(label, device):
    """No neighbour's logits: an error by the definition, NaN by the kernel."""
    hidden, weight, targets, weights = inputs(5, 6, 31, torch.float32, device, ignored=0)
    targets[1] = label
    try:
        loss = segment_cross_entropy(hidden, targets, weights, lambda rows: rows @ weight.T)
    except (IndexError, RuntimeError) as error:
        assert "out of bounds" in str(error)
    else:
        assert loss.isnan()


def test_a_vocabulary_of_several_kernel_blocks(device):
    hidden, weight, targets, weights = inputs(3, 4, 20_001, torch.float32, device, ignored=0)
    targets[0], targets[1] = 20_000, 0
    leaf = hidden.detach().requires_grad_()
    loss = segment_cross_entropy(leaf, targets, weights, lambda rows: rows @ weight.T)
    (grad,) = torch.autograd.grad(loss / 7, leaf)
    truth, stock = (
        plain(hidden, weight, targets, weights, dtype, 1.0, None)
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_good(loss / 7, truth[0], stock[0])
    assert_as_good(grad, truth[1], stock[1])


def test_extreme_logits(device):
    """Far logits, and tokens that a head rules out by minus infinity."""
    logits = torch.tensor([[1e4, -1e4, 0.0, -float("inf")], [-1e4, -1e4, -1e4, -1e4]])
    hidden = torch.eye(2, device=device).requires_grad_()
    targets = torch.tensor([0, 2], device=device)
    logits = logits.to(device)
    loss = segment_cross_entropy(
        hidden,
        targets,
        torch.ones(2, device=device),
        lambda rows: logits[rows.argmax(1)] + 0 * rows.sum(),
    )
    assert loss.item() == pytest.approx(1.3863, abs=1e-3)  # an ulp of 1e4


def test_without_a_gradient_the_logits_are_left(device):
    hidden, weight, targets, weights = inputs(9, 4, 11, torch.float32, device, ignored=0)
    logits = hidden @ weight.T
    before = logits.clone()
    with torch.no_grad():
        loss = segment_cross_entropy(hidden, targets, weights, lambda rows: logits)
    assert torch.equal(logits, before) and not loss.requires_grad


def test_it_never_makes_all_logits(device):
    seen = []

    def head(rows):
        seen.append(len(rows))
        return rows @ torch.ones(4, 9, device=device)

    targets = torch.tensor([1, IGNORE_INDEX, 2, 3, IGNORE_INDEX, 4, 5], device=device)
    hidden = torch.randn(7, 4, device=device, requires_grad=True)
    weights = torch.ones(7, device=device)
    segment_cross_entropy(hidden, targets, weights, head, segment_size=2).backward()
    assert seen == [2, 2, 1]


def test_without_labels_it_is_zero_and_differentiable(device):
    hidden = torch.randn(3, 4, device=device, requires_grad=True)
    targets = torch.full((3,), IGNORE_INDEX, device=device)
    weights = torch.ones(3, device=device)
    loss = segment_cross_entropy(hidden, targets, weights, lambda rows: rows)
    loss.backward()
    assert loss.item() == 0 and (hidden.grad == 0).all()


def test_it_has_one_backward():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = segment_cross_entropy(
        hidden, torch.zeros(3).long(), torch.ones(3), lambda rows: rows * 1, segment_size=2
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def test_only_a_plain_linear_is_bypassed():
    head, cpu = nn.Linear(3, 5, bias=False), torch.device("cpu")
    assert plain_weight(head, cpu, torch.float32, []) is head.weight
    assert plain_weight(head, cpu, torch.float32, [head.weight]) is None  # fp32: autograd adds up
    assert plain_weight(head, cpu, torch.bfloat16, []) is None
    assert plain_weight(nn.Linear(3, 5), cpu, torch.float32, []) is None
    assert plain_weight(head.forward, cpu, torch.float32, []) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_weight(head, cpu, torch.float32, []) is None
        low = nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
        assert plain_weight(low, cpu, torch.bfloat16, []) is low.weight
        assert plain_weight(low, cpu, torch.bfloat16, [low.weight]) is None
    handle = head.register_forward_hook(lambda *args: None)
    assert plain_weight(head, cpu, torch.float32, []) is None
    handle.remove()
    head.forward = lambda rows: rows
    assert plain_weight(head, cpu, torch.float32, []) is None


@pytest.mark.parametrize(("vocabulary", "rows"), [(128_256, 576), (32_000, 960), (None, 512)])
def test_segments_take_a_tenth_of_the_memory_there_is(vocabulary, rows):
    hidden = torch.empty(32_768, 4096, device="meta")
    assert choose_segment_size(hidden, vocabulary, trained=False) == rows
    assert choose_segment_size(hidden, vocabulary, trained=True) == 2048
    least = {128_256: 512, 32_000: 1024, None: 512}[vocabulary]  # 2**25 / (32,000 + 2 * 64)
    assert choose_segment_size(hidden[:1, :64], vocabulary, trained=True) == least


def test_a_frozen_head_is_bypassed_with_the_same_result(device):
    hidden, weight, targets, weights = inputs(40, 6, 31, torch.float32, device)
    head = nn.Linear(6, 31, bias=False, device=device).requires_grad_(False)
    head.weight.copy_(weight)
    results = []
    for function in (head, lambda rows: head(rows)):
        leaf = hidden.detach().requires_grad_()
        loss = segment_cross_entropy(leaf, targets, weights, function, segment_size=16)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results)
