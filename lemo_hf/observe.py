"""A look into a dense forward pass: each layer and what it is about to read."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lemo_hf.checks import check_model
from lemo_hf.config import LeMoConfig
from lemo_hf.families import Family
from lemo_hf.policies import ScoreInputs
from lemo_hf.step import Step


@torch.no_grad()
def observe(
    model: nn.Module,
    config: LeMoConfig,
    input_ids: Tensor,
    see: Callable[[ScoreInputs], None],
    *,
    attention_mask: Tensor | None = None,
    sublayers: Sequence[str] = ("attention",),
) -> None:
    """Run the decoder densely and call ``see`` before each sublayer of each layer, in order.

    No logits are made and nothing is kept. ``see`` may score the blocks by any policy, or train on
    what it sees (under `torch.enable_grad`).

    Args:
        model: A transformers causal LM of a supported family, in evaluation mode.
        config: Block size and kind of score.
        input_ids: ``[B, T]`` int64.
        see: Gets the layer and its stream before elimination, ``[B, T, H]``.
        attention_mask: ``[B, T]``, 1 = token, or None.
        sublayers: ``"attention"``, ``"mlp"``, or both.
    """
    family = check_model(model)
    step = Step(
        config,
        tuple(input_ids.shape),
        input_ids.device,
        input_ids=input_ids,
        attention_mask=attention_mask,
    )
    looking: list[str] = []
    with ExitStack() as hooks:
        for index, layer in enumerate(model.get_submodule(family.layers)):
            positions: dict = {}
            for sublayer in ("attention", "mlp"):

                def before(_, args, kwargs, layer=layer, index=index, at=sublayer, pos=positions):
                    x = args[0] if args else kwargs["hidden_states"]
                    if at == "attention":
                        pos["embeddings"] = kwargs.get("position_embeddings")
                    if at not in sublayers or looking:
                        return
                    x = x.view(*input_ids.shape, x.shape[-1])  # OPT's MLP sees rows alone
                    looking.append(at)  # scoring calls the very norm that is hooked
                    see(ScoreInputs(layer, family, index, at, x, pos["embeddings"], step, None))
                    looking.pop()

                module = layer if sublayer == "attention" else _mlp_start(layer, family)
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                hooks.callback(handle.remove)
        model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def _mlp_start(layer: nn.Module, family: Family) -> nn.Module:
    """The module that reads the stream first on the way into the MLP."""
    post_norm = family.pre_norm_flag and not getattr(layer, family.pre_norm_flag)
    norm_first = family.mlp_norm is not None and not post_norm
    return getattr(layer, family.mlp_norm if norm_first else family.mlp[0])
