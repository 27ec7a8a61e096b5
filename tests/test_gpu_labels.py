"""On a CUDA GPU, where the kernels run: labels that are no token, none at all, and left padding."""

import pytest
import torch
from support.labelled import left_padded, with_a_row_of_padding, without_those_of_padding
from support.models import batch, loss_and_gradients, make_model, relative_error

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.kernels.segment_cross_entropy import segment_cross_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("target", [-1, 97])
def test_the_kernel_reads_no_neighbours_logits(target):
    head = torch.nn.Linear(32, 97, bias=False).cuda()
    hidden = torch.randn(4, 32, device="cuda")
    targets = torch.tensor([3, target, 5, 7], device="cuda")
    loss = segment_cross_entropy(hidden, targets, torch.ones(4, device="cuda"), head)
    assert loss.isnan()


def on_gpu(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


def sparse_model(retention=0.5, **options):
    model = make_model("llama", "sdpa").cuda()
    apply_lemo(model, LeMoConfig(retention=retention, block_size=8, **options))
    return model


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("label", [-1, 97, 10**6])
def test_a_label_that_is_no_token_is_refused(label, graphs):
    """By the host, and the device goes on: no assertion in a kernel."""
    model, inputs = sparse_model(cuda_graphs=graphs), on_gpu(batch())
    inputs["labels"][1, 40] = label
    for _ in range(3):
        with pytest.raises(ValueError, match=f"the first of them is {label}"):
            model(**inputs)
    for _ in range(3):
        assert model(**on_gpu(batch())).loss.isfinite()


@pytest.mark.parametrize("items", [None, 0])
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("retention", [0.5, 1.0])
def test_a_batch_without_labels_teaches_nothing(retention, tokens, items):
    model, inputs = sparse_model(retention), on_gpu(batch(2, tokens))
    inputs["labels"].fill_(-100)
    loss, gradients = loss_and_gradients(model, **inputs, num_items_in_batch=items)
    assert loss == 0
    assert all(x.isfinite().all() and not x.any() for x in gradients.values())


@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("case", [left_padded, with_a_row_of_padding])
def test_padding_counts_nowhere(case, items):
    """At retention 1 the stock model's loss on labels without padding's."""
    inputs = on_gpu(case())
    stock = make_model("llama", "sdpa").cuda()
    loss, gradients = loss_and_gradients(stock, **without_those_of_padding(inputs))
    given = {"num_items_in_batch": (inputs["labels"][:, 1:] != -100).sum()} if items else {}
    ours, found = loss_and_gradients(sparse_model(1.0), **inputs, **given)
    assert ours == pytest.approx(loss, rel=1e-4)
    assert all(relative_error(found[name], x) < 1e-3 for name, x in gradients.items())


@pytest.mark.parametrize("case", [left_padded, with_a_row_of_padding])
def test_the_gpu_gives_what_the_cpu_gives(case):
    options = {"policy": "random", "agree_across_layers": False}
    loss, gradients = loss_and_gradients(sparse_model(**options), **on_gpu(case()))
    model = make_model("llama", "sdpa")
    apply_lemo(model, LeMoConfig(retention=0.5, block_size=8, **options))
    expected, others = loss_and_gradients(model, **case())
    assert loss == pytest.approx(expected, rel=1e-4)
    assert all(relative_error(gradients[n].cpu(), x) < 1e-3 for n, x in others.items())
