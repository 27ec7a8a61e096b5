"""The definition of a sparse pass, written a second time: a dense model with tokens masked.

The stock model runs on all tokens. Hooks hide eliminated tokens' keys from every attention and set
eliminated tokens' sublayer outputs to zero. Nothing of lemo_hf takes part but the kept sets.
"""

from contextlib import contextmanager
from functools import partial

import torch

from lemo_hf.core.sparse_pass import SparsePass


@contextmanager
def recorded_sets(monkeypatch):
    """Collects ``(sublayer, keep_mask [B, T])`` in the order in which layers choose."""
    chosen = []
    choose = SparsePass.choose

    def record(sparse_pass, layer_index, sublayer, *args, **kwargs):
        kept = choose(sparse_pass, layer_index, sublayer, *args, **kwargs)
        slots = torch.ones_like(kept.index, dtype=torch.bool)
        slots = slots if kept.slot_mask is None else kept.slot_mask
        keep_mask = slots.new_zeros(sparse_pass.batch, sparse_pass.tokens)
        keep_mask.scatter_(1, kept.index, slots)
        chosen.append((sublayer, keep_mask))
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(SparsePass, "choose", record)
        yield chosen


@contextmanager
def masked_dense(layers, sets, mlp_output, attention_name="self_attn", recurrent_name=None):
    """Make the stock ``layers`` behave as if they kept ``sets``.

    Args:
        layers: Decoder layers, all of them sparse.
        sets: ``(attention keep_mask, MLP keep_mask)`` a layer, ``[B, T]`` bool each.
        mlp_output: Name of the module whose output is the MLP's update; several that add to it.
        attention_name: Of the attention of a layer. Where it and the MLP are handed the residual
            and add it themselves (BLOOM), what is left of their output is the residual.
        recurrent_name: Of what stands in its place in layers that pass a state on, if any do. It is
            run on each row's kept tokens alone, one after the other.
    """
    handles, shortened = [], []
    for layer, (attention, mlp) in zip(layers, sets, strict=True):

        def hide_keys(_, args, kwargs, keep=attention):
            mask = kwargs["attention_mask"].expand(len(keep), -1, -1, -1)
            # Eager attention's softmax is fp32 at any dtype: fp64's lowest value would overflow.
            floor = max(torch.finfo(mask.dtype).min, -1e9)
            mask = mask.clamp_min(floor).masked_fill(~keep[:, None, None, :], floor)
            kwargs["attention_mask"] = mask
            return args, kwargs

        def zero_attention(_, args, output, keep=attention):
            rest = args[1] if len(args) == 2 else 0
            return (torch.where(keep[..., None], output[0], rest), *output[1:])

        def zero_mlp(_, args, output, keep=mlp):
            rest = args[1] if len(args) == 2 else 0
            return torch.where(keep.reshape(*output.shape[:-1], 1), output, rest)

        module = getattr(layer, recurrent_name or "", None)
        if module is None:
            module = getattr(layer, attention_name)
            handles.append(module.register_forward_pre_hook(hide_keys, with_kwargs=True))
            handles.append(module.register_forward_hook(zero_attention))
        else:
            module.forward = partial(_on_kept_alone, module, attention)
            shortened.append(module)
        for name in mlp_output.split():
            handles.append(layer.get_submodule(name).register_forward_hook(zero_mlp))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in shortened:
            del module.forward


def _on_kept_alone(module, keep, hidden_states, **_):
    rows = []
    for row, kept in zip(hidden_states, keep, strict=True):
        update = type(module).forward(module, row[kept][None])
        rows.append(torch.zeros_like(row).index_put((kept.nonzero()[:, 0],), update[0]))
    return torch.stack(rows)


def expected_loss(logits, labels, supervised, attention_mask=None):
    """Mean over rows of the mean loss on supervised tokens, rows weighted by their labels.

    What padding would have to predict, the first token of a row that is padded on the left, is no
    label.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    wide = torch.promote_types(logits.dtype, torch.float32)
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).to(wide), targets.flatten(), ignore_index=-100, reduction="none"
    ).view_as(targets)
    labelled = targets != -100
    if attention_mask is not None:
        labelled = labelled & attention_mask.bool()
    asked = labelled & supervised
    rows = (nll * asked).sum(1) / asked.sum(1).clamp_min(1) * labelled.sum(1)
    return rows.sum() / labelled.sum().clamp_min(1)
