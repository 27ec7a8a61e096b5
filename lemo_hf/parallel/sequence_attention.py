"""Attention of rows that several processes share: each computes some heads of all rows.

The model's attention module runs unchanged: projections and rotary positions of this process's
rows. Only the attention function that it calls is replaced: one all-to-all exchanges queries, keys
and values of all heads of these rows for some heads of all kept rows; the model's own
implementation attends; its output is exchanged back.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo_hf.altered import Altered
from lemo_hf.parallel.sequence_parallel import Share, exchange

_NAME = "lemo_sequence_parallel"


def shared_config(config: Any, share: Share) -> Any:
    """``config`` of an attention module that works on the rows of ``share``."""
    return Altered(config, {"_attn_implementation": _NAME, "lemo_share": (share, config)})


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function like transformers': ``[1, heads, n, D]`` each to ``[1, n, heads, D]``."""
    share, config = module.config.lemo_share
    group, rows = share.group, query.shape[2]
    # Fewer key heads than processes, or not a multiple: each is sent as often as it takes.
    repeats = math.lcm(key.shape[1], group.size) // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    heads = [x.shape[1] // group.size for x in (query, key, value)]
    # [1, heads, n, D] to [processes, n, heads of one, D], side by side.
    parts = [x[0].unflatten(0, (group.size, -1)).transpose(1, 2) for x in (query, key, value)]
    sent = torch.cat(parts, 2).flatten(0, 1)
    received = exchange(sent, [rows] * group.size, share.counts, group)
    query, key, value = received.transpose(0, 1)[None].split(heads, 1)
    some = Altered(module, {"config": config, "num_key_value_groups": heads[0] // heads[1]})
    attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    out, _ = attend(some, query, key, value, attention_mask, **kwargs)
    back = exchange(out[0], share.counts, [rows] * group.size, group)
    return back.unflatten(0, (group.size, rows)).transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register(_NAME, _attend)
