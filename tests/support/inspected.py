"""The demo's model and text, and what a training pass of it keeps."""

import torch

from lemo_hf import apply_lemo, remove_lemo

IDS = torch.randint(3, 97, (150,), generator=torch.Generator().manual_seed(5)).tolist()


def training_pass(model, config, ids, labels=None, step=(0, None)):
    """The blocks that an ordinary training pass keeps: ``{(layer, sublayer): [N]}``."""
    lemo = apply_lemo(model, config)
    lemo.begin_step(*step)
    batch = torch.tensor([ids])
    model.train()
    model(input_ids=batch, labels=batch if labels is None else torch.tensor([labels]))
    sets = {key: blocks[0].tolist() for key, blocks in lemo.passes.tally.kept_blocks.items()}
    remove_lemo(model)
    return sets
