"""Scores of one layer of a stock model."""

import torch

from lemo_hf import LeMoConfig
from lemo_hf.core.families import family_of
from lemo_hf.core.policies import POLICIES, ScoreInputs
from lemo_hf.core.sparse_pass import SparsePass
from support.models import batch


def labels_behind(ids, start):
    """What positions must predict where labels begin at ``start``."""
    places = torch.arange(ids.shape[1])
    return torch.where((places >= start - 1) & (places < ids.shape[1] - 1), ids.roll(-1, 1), -100)


def score(
    model,
    policy,
    sublayer="attention",
    block_size=8,
    attention_mask=None,
    tokens=70,
    labels_from=None,
    **options,
):
    """Scores of layer 1, whose input is captured from the stock model."""
    config = LeMoConfig(policy="recent", block_size=block_size, **options)
    ids = batch()["input_ids"][:, :tokens]
    seen = {}

    def capture(_, args, kwargs):
        seen.update(x=args[0], positions=kwargs.get("position_embeddings"))
        seen.update(ids=kwargs.get("position_ids") if family.reads_positions else None)

    family = family_of(model.config)
    layer = model.get_submodule(family.layers)[1]
    with layer.register_forward_pre_hook(capture, with_kwargs=True), torch.no_grad():
        model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        sparse_pass = SparsePass(
            config,
            ids.shape,
            ids.device,
            input_ids=ids,
            attention_mask=attention_mask,
            targets=None if labels_from is None else labels_behind(ids, labels_from),
        )
        inputs = ScoreInputs(
            layer=layer,
            family=family,
            layer_index=1,
            sublayer=sublayer,
            x=seen["x"],
            position_embeddings=seen["positions"],
            sparse_pass=sparse_pass,
            predictor=None,
            position_ids=seen["ids"],
        )
        return POLICIES[policy](inputs), inputs
