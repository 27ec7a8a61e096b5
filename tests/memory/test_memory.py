"""Memory is measured: bytes saved for backward, counted by saved-tensor hooks on the CPU."""

import pytest
import torch
from support.models import batch, make_model, with_lora

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo

TOKENS = 256


def saved_bytes(model):
    """Bytes of distinct storages that one forward pass saves, and the shapes of its tensors."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, shapes, alive = {}, [], []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            shapes.append(tuple(tensor.shape))
            alive.append(tensor)  # or its place in memory might be counted as another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch(2, TOKENS)).loss
    loss.backward()
    return sum(storages.values()), shapes


def sparse(model, **options):
    apply_lemo(model, LeMoConfig(block_size=16, policy="recent", segment_size=32, **options))
    try:
        return saved_bytes(model)
    finally:
        remove_lemo(model)


@pytest.fixture
def model():
    return with_lora(make_model("llama", "sdpa", intermediate_size=96, vocab_size=512))


def test_saved_bytes_fall_with_retention(model):
    """All that a layer saves belongs to kept rows: bytes are a line in the kept tokens."""
    bytes_at = {share: sparse(model, retention=share)[0] for share in (0.25, 0.5, 0.75, 1.0)}
    steps = [bytes_at[b] - bytes_at[a] for a, b in ((0.25, 0.5), (0.5, 0.75), (0.75, 1.0))]
    assert max(steps) < 1.02 * min(steps)
    rest = bytes_at[0.25] - steps[0]  # what does not depend on retention
    assert abs(rest) < 0.01 * bytes_at[1.0]


def test_no_vocabulary_sized_tensor_is_saved(model):
    stock, shapes = saved_bytes(model)
    assert any(shape[-1:] == (512,) for shape in shapes)
    ours, shapes = sparse(model, retention=1.0)
    assert not any(shape[-1:] == (512,) for shape in shapes)
    assert ours < stock


@pytest.mark.parametrize("mlp_retention", [None, 0.25])
def test_checkpointed_layers_hold_kept_rows_only(model, mlp_retention):
    """One set of rows a layer if attention and MLP share it, one each if not, and no stream."""
    _, shapes = sparse(model, retention=0.5, mlp_retention=mlp_retention, recompute="full")
    hidden = [shape for shape in shapes if len(shape) == 3 and shape[-1] == 32]
    kept = [shape for shape in hidden if shape == (2, TOKENS // 2, 32)]
    quarter = [shape for shape in hidden if shape == (2, TOKENS // 4, 32)]
    whole = [shape for shape in hidden if shape == (2, TOKENS, 32)]
    # The first layer's rows come from frozen embeddings and are stored all the same.
    assert len(kept) == 4 and len(quarter) == (0 if mlp_retention is None else 4)
    assert not whole


def test_checkpointing_saves_less_than_transformers_does(model):
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    stock, _ = saved_bytes(model)
    ours, _ = sparse(model, retention=0.5)
    assert ours < 0.6 * stock
