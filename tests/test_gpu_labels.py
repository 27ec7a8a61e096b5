"""On a CUDA GPU, where only the kernels run: labels that are no token, no labels, left padding."""

import pytest
import torch
from models import batch, loss_and_gradients, make_model, relative_error

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.kernels.segment_cross_entropy import segment_cross_entropy

pytestmark = pytest.mark.gpu


def on_gpu(**changes):
    inputs = {name: value.cuda() for name, value in batch().items()}
    return inputs | {name: value.cuda() for name, value in changes.items()}


@pytest.mark.parametrize("label", [-1, 97, 10**6])
@pytest.mark.parametrize("retention", [0.5, 1.0])
def test_a_label_that_is_no_token_is_refused(label, retention):
    model = make_model("llama").cuda()
    apply_lemo(model, LeMoConfig(block_size=8, retention=retention))
    inputs = on_gpu()
    inputs["labels"][1, 40] = label
    with pytest.raises(ValueError, match=f"1 labels .* 97 tokens of the model, .* {label}\\. Set"):
        model(**inputs)
    assert model(**on_gpu()).loss.item() > 0  # the failed pass left nothing behind


@pytest.mark.parametrize("target", [-1, 97])
def test_the_kernel_reads_no_neighbours_logits(target):
    head = torch.nn.Linear(32, 97, bias=False).cuda()
    hidden = torch.randn(4, 32, device="cuda")
    targets = torch.tensor([3, target, 5, 7], device="cuda")
    loss = segment_cross_entropy(hidden, targets, torch.ones(4, device="cuda"), head)
    assert loss.isnan()


@pytest.mark.parametrize("retention", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_labels_teaches_nothing(retention, dtype):
    model = make_model("llama").to("cuda", dtype)
    apply_lemo(model, LeMoConfig(block_size=8, retention=retention))
    labels = torch.full_like(on_gpu()["labels"], -100)
    loss, gradients = loss_and_gradients(model, **on_gpu(labels=labels))
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("start", [1, 9])
def test_left_padding_is_as_the_stock_model_has_it(start):
    """Only what padding predicts is left out, which the stock model asks."""
    inputs = on_gpu()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :start] = 0
    inputs["attention_mask"] = mask
    labels = inputs["labels"].clone()
    labels[0, : start + 1] = -100  # of padding, and what padding would have to predict
    model = make_model("llama").cuda()
    loss, gradients = loss_and_gradients(model, **inputs | {"labels": labels})
    apply_lemo(model, LeMoConfig(block_size=8, retention=1.0))
    for given in (labels, inputs["labels"]):
        ours, of_ours = loss_and_gradients(model, **inputs | {"labels": given})
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
        assert all(relative_error(of_ours[n], gradients[n]) < 1e-4 for n in gradients)
    remove_lemo(model)
