"""Observation of a dense forward pass: each layer and its input."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo_hf.config import LeMoConfig
from lemo_hf.core.checks import check_model
from lemo_hf.core.family import Family
from lemo_hf.core.policies import ScoreInputs
from lemo_hf.core.sparse_pass import SparsePass


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    config: LeMoConfig,
    input_ids: Tensor,
    see: Callable[[ScoreInputs], None],
    *,
    attention_mask: Tensor | None = None,
    targets: Tensor | None = None,
    sublayers: Sequence[str] = ("attention",),
) -> None:
    """Run the decoder dense and call ``see`` before each sublayer of each layer, in order.

    No logits are made and nothing is stored. ``see`` may score the blocks by any policy, or train
    on what it gets (under `torch.enable_grad`).

    Args:
        model: Causal LM of a supported family, in evaluation mode.
        config: Block size and kind of score.
        input_ids: ``[B, T]`` int64.
        see: Function of the layer and the stream that it reads, ``[B, T, H]``.
        attention_mask: ``[B, T]``, 1 = token, or None.
        targets: ``[B, T]`` token that each position must predict, which decide what blocks ask; or
            None.
        sublayers: Names of the sublayers: ``"attention"``, ``"mlp"``, or both.
    """
    family = check_model(model)
    layers = cast(nn.ModuleList, model.get_submodule(family.layers))
    sparse_pass = SparsePass(
        config,
        (input_ids.shape[0], input_ids.shape[1]),
        input_ids.device,
        input_ids=input_ids,
        attention_mask=attention_mask,
        targets=targets,
    )
    looking: list[str] = []
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            row = family.of_layer(layer)
            positions: dict[str, Any] = {}
            for sublayer in ("attention", "mlp"):

                def before(
                    _: nn.Module,
                    args: tuple[Any, ...],
                    kwargs: dict[str, Any],
                    layer: nn.Module = layer,
                    row: Family = row,
                    index: int = index,
                    at: str = sublayer,
                    pos: dict[str, Any] = positions,
                ) -> None:
                    x = args[0] if args else kwargs["hidden_states"]
                    if at == "attention":
                        pos["embeddings"] = kwargs.get("position_embeddings")
                        pos["ids"] = kwargs.get("position_ids") if row.reads_positions else None
                    if at not in sublayers or looking:
                        return
                    x = x.view(*input_ids.shape, x.shape[-1])  # OPT's MLP sees rows alone
                    looking.append(at)  # scoring calls the very norm that is hooked
                    see(
                        ScoreInputs(
                            *(layer, row, index, at, x, pos["embeddings"], sparse_pass, None),
                            position_ids=pos["ids"],
                        )
                    )
                    looking.pop()

                module = layer if sublayer == "attention" else _mlp_start(layer, row)
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                hooks.callback(handle.remove)
        model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def _mlp_start(layer: nn.Module, family: Family) -> nn.Module:
    """The first module on the way into the MLP that reads the stream."""
    if family.parallel:
        return layer
    post_norm = family.pre_norm_flag and not getattr(layer, family.pre_norm_flag)
    first = family.mlp[0] if family.mlp_norm is None or post_norm else family.mlp_norm
    return getattr(layer, first)
