"""`LeMoSFTTrainer`: TRL's SFTTrainer with sparse training passes."""

from typing import Any

from trl import SFTTrainer

from lemo_hf.trainer import LeMoMixin


class LeMoSFTTrainer(LeMoMixin, SFTTrainer):
    """`trl.SFTTrainer` with one more argument, ``lemo_config``.

    Args:
        lemo_config: Settings of what each layer leaves out in training; None: plain `SFTTrainer`.

    All other arguments are SFTTrainer's: data formats and chat templates, packing, padding-free
    batches, losses on completions or assistant turns, ``peft_config``. The loss is SFTTrainer's
    own, computed from its log-probabilities, and so are the entropy and token accuracy that it
    logs. They cover the tokens that ``LeMoConfig(supervise=...)`` names.

    Raises:
        ValueError: LeMo does not support the model or the way it is run. Raised before training
            starts.
    """

    def __init__(self, model: Any, args: Any = None, *more: Any, **kwargs: Any):
        if args is not None and kwargs.get("lemo_config") is not None:
            check_args(args)
        super().__init__(model, args, *more, **kwargs)
        if kwargs.get("lemo_config") is not None and getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                "the experts' auxiliary loss is not supported in TRL, which makes its loss outside "
                "the model: set SFTConfig(router_aux_loss_coef=0.0), or use LeMoTrainer, which "
                "computes it over kept tokens."
            )

    def _loss_is_outside(self) -> bool:
        return True


def check_args(args: Any) -> None:
    """Raises ValueError for TRL's own ways to store less, which work on whole layers of a dense
    pass."""
    if getattr(args, "activation_offloading", False):
        raise ValueError(
            "activation_offloading=True is not supported: sparse layers decide for themselves what "
            "to store. Set it to False and use LeMoConfig(offload_gib=...)."
        )
    if (args.gradient_checkpointing_kwargs or {}).get("selective"):
        raise ValueError(
            "gradient_checkpointing_kwargs={'selective': True} is not supported: leave it out and "
            "use LeMoConfig(recompute='selective'), which keeps attention's output as well."
        )
