"""Labels that are no token, labels of padding, and sets that must hold something to predict."""

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.dense_reference import expected_loss, recorded_sets
from support.labelled import left_padded, with_a_row_of_padding, without_those_of_padding
from support.models import batch, loss_and_gradients, make_model, relative_error

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.config import KeepRule
from lemo_hf.core.labels import Labels
from lemo_hf.core.sparse_pass import SparsePass


@pytest.mark.parametrize("label", [-1, -99, 97, 10**6])
@pytest.mark.parametrize("retention", [0.5, 1.0])
@pytest.mark.parametrize("threshold", [False, True])
def test_a_label_that_is_no_token_is_refused_as_by_the_stock_model(label, retention, threshold):
    model = make_model("llama")
    inputs = batch()
    inputs["labels"][1, 40] = label
    with pytest.raises(IndexError):
        model(**inputs)
    rule = {"threshold": 0.5, "policy": "oracle"} if threshold else {"retention": retention}
    apply_lemo(model, LeMoConfig(block_size=8, agree_across_layers=False, **rule))
    with pytest.raises(ValueError, match=f"1 labels .* 97 tokens of the model, .* {label}\\. Set"):
        model(**inputs)
    assert model(**batch()).loss.item() > 0  # the failed pass left nothing behind


def test_a_label_that_nothing_predicts_may_be_anything():
    model = make_model("llama")
    apply_lemo(model, LeMoConfig(block_size=8))
    inputs = batch()
    expected = model(**inputs).loss
    inputs["labels"][:, 0] = -1
    assert model(**inputs).loss == expected


def test_added_tokens_may_be_labels():
    model = make_model("llama")
    apply_lemo(model, LeMoConfig(block_size=8))
    model.resize_token_embeddings(105)
    inputs = batch()
    inputs["labels"][0, 30] = 104
    assert model(**inputs).loss.item() > 0


def kept_targets(config, targets, **facts):
    """How many targets the set of the first layer holds, for each row."""
    sparse_pass = SparsePass(config, targets.shape, targets.device, targets=targets, **facts)
    scores = torch.rand(targets.shape[0], sparse_pass.num_blocks)
    kept = sparse_pass.choose(0, "attention", KeepRule(config.retention), lambda: scores)
    tokens = sparse_pass.tokens_of(kept.blocks)
    return (tokens & (targets >= 0)).sum(1), sparse_pass, kept


def test_a_set_holds_something_to_predict():
    """The last block is one token, which predicts nothing; the first has no label."""
    ids = batch(1, 177)["input_ids"]
    labels = ids.clone()
    labels[:, :17] = -100
    model = make_model("llama")
    lemo = apply_lemo(model, LeMoConfig(retention=0.15, block_size=16))
    loss, gradients = loss_and_gradients(model, input_ids=ids, labels=labels)
    assert loss > 1 and all(x.abs().max() > 0 for x in gradients.values())
    assert lemo.passes.tally.kept_blocks[0, "attention"].sum() == 3


def test_each_document_of_a_set_holds_something_to_predict():
    lengths = (400, 480, 320)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    targets = torch.arange(1200)[None].clone()
    bounds = (0, 400, 880, 1200)
    for first, end in pairwise(bounds):
        targets[0, first : first + 8] = -100  # the blocks that are always kept
        targets[0, end - 8 : end] = -100
    config = LeMoConfig(retention=0.1, block_size=8, policy="recent")
    sparse_pass = SparsePass(
        config, (1, 1200), positions.device, targets=targets, position_ids=positions
    )
    assert not sparse_pass.label_blocks.any()  # so many labels bind no block by themselves
    blocks = sparse_pass.block_documents[0]
    predicting = (targets >= 0).view(-1, 8).any(1)
    assert len(blocks.unique()) == 3
    for document in blocks.unique():
        inside = (blocks == document) & predicting
        assert (sparse_pass.required[0] & inside).sum() == 1


def test_rows_without_labels_ask_for_no_block():
    targets = torch.full((1, 64), -100)
    count, sparse_pass, kept = kept_targets(LeMoConfig(retention=0.25, block_size=8), targets)
    assert count.item() == 0 and kept.blocks.sum() == 2 and sparse_pass.required.sum() == 2


@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("supervise", ["kept", "all"])
@pytest.mark.parametrize("case", [left_padded, with_a_row_of_padding])
def test_what_padding_would_predict_is_in_no_count(case, supervise, items):
    inputs, model = case(), make_model("llama")
    honest = without_those_of_padding(inputs)
    number = (inputs["labels"][:, 1:] != -100).sum()
    assert number > (honest["labels"][:, 1:] != -100).sum()
    loss, gradients = loss_and_gradients(model, **honest)
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8, supervise=supervise))
    given = {"num_items_in_batch": number} if items else {}
    ours, found = loss_and_gradients(model, **inputs, **given)
    assert ours == pytest.approx(loss, rel=2e-6)
    assert all(relative_error(found[name], x) < 2e-5 for name, x in gradients.items())


def test_accumulated_padding_weighs_as_its_batch_does():
    """A batch's share of the items is that of all its labels, whether they can be asked or not."""
    inputs, model = left_padded(), make_model("llama")
    apply_lemo(model, LeMoConfig(retention=1.0, block_size=8))
    number = (inputs["labels"][:, 1:] != -100).sum()
    alone = model(**inputs).loss
    half = model(**inputs, num_items_in_batch=2 * number).loss
    assert half.item() == pytest.approx(alone.item() / 2, rel=1e-6)


@pytest.mark.parametrize("supervise", ["kept", "all"])
def test_a_loss_outside_asks_no_padding(supervise, monkeypatch):
    inputs = left_padded()
    labels = Labels.copy_of(inputs["labels"], 3 * 69)
    model = make_model("llama")
    lemo = apply_lemo(model, LeMoConfig(retention=0.5, block_size=8, supervise=supervise))
    lemo.passes.announced.for_next = labels
    rest = {name: x for name, x in inputs.items() if name != "labels"}
    with recorded_sets(monkeypatch) as chosen:
        logits = model(**rest).logits
    asked = chosen[0][1] if supervise == "kept" else inputs["attention_mask"].bool()
    left = (labels.tensor[:, 1:] != -100).sum()
    assert left == asked[:, :-1].sum()
    assert labels.num_items.item() == pytest.approx(
        3 * 69 * left.item() / (inputs["labels"][:, 1:] != -100).sum().item()
    )
    remove_lemo(model)
    expected = expected_loss(
        logits, inputs["labels"], asked, inputs["attention_mask"]
    )  # rows weighted by their labels: the same targets, of a loss of its own
    assert expected.isfinite()


def test_other_labels_are_struck_as_their_loss_ignores():
    """``ignore_index`` may be a token, which is then no label."""
    tensor = torch.arange(3, 35)[None].clone()
    tensor[0, 20] = 7
    labels = Labels.copy_of(tensor, None, ignored=7)
    sparse_pass = SparsePass(
        LeMoConfig(block_size=8), (1, 32), torch.device("cpu"), targets=labels.targets()
    )
    assert sparse_pass.rows[0].labels == 31 - 2  # one 7 more stands at its own place
    sparse_pass.times_kept[0, :16] = 1
    labels.strike(sparse_pass)
    assert (labels.tensor[0, 17:] == 7).all() and labels.tensor[0, 1:17].tolist() == [*range(4, 20)]


def test_an_adapted_head_refuses_as_well():
    model = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    apply_lemo(model, LeMoConfig(block_size=8))
    inputs = batch()
    inputs["labels"][0, 5] = 97
    with pytest.raises(ValueError, match="is 97"):
        model(**inputs)
