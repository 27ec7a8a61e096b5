"""`LeMoDPOTrainer`: TRL's DPOTrainer, whose trained model and reference read the same kept
tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from trl import DPOTrainer

from lemo_hf.config import LeMoConfig
from lemo_hf.core.pair_sets import PairSets
from lemo_hf.integrations.adapters_off import quickly_disabled, switches_of
from lemo_hf.integrations.trl import check_args
from lemo_hf.lemo import LeMo
from lemo_hf.patch import lemo_of, remove_lemo, take_over
from lemo_hf.predictors.predictor_set import LeMoPredictor
from lemo_hf.trainer import LeMoMixin

# Their scores are of tokens alone, so that no training changes them.
OF_TOKENS = ("auto", "overlap", "chunks", "recent", "window", "random")


class LeMoDPOTrainer(LeMoMixin, DPOTrainer):
    """`trl.DPOTrainer` with one more argument, ``lemo_config``.

    Args:
        lemo_config: Settings of what each layer leaves out in training; None: plain `DPOTrainer`.

    All other arguments are DPOTrainer's, and so are all losses, rewards and logged figures: they
    are made of log-probabilities of the completions, which no layer leaves out. Of a prompt, the
    blocks that its two completions need are kept, chosen once. The chosen row, the rejected row and
    the reference read the same blocks, whether the reference is the model without its adapter, a
    separate model, or computed in advance. With ``fp8`` both multiply in FP8 in the same steps, and
    the weights of a separate reference are frozen for it.

    Raises:
        ValueError: LeMo does not support the model or the way it is run. Raised before training
            starts.
    """

    def __init__(
        self, model: Any, ref_model: Any = None, args: Any = None, *more: Any, **kwargs: Any
    ):
        config = kwargs.get("lemo_config")
        self._pairs = PairSets()
        self._switches: list[Any] = []
        if args is not None and isinstance(config, LeMoConfig):
            check_args(args)
            _check(args, config)
            self._pairs.fixed = args.precompute_ref_log_probs
        super().__init__(model, ref_model, args, *more, **kwargs)

    def _apply_lemo(
        self, model: nn.Module, config: LeMoConfig, predictor: LeMoPredictor | None = None
    ) -> LeMo:
        if self.aux_loss_enabled:
            raise ValueError(
                "the auxiliary loss of experts is not supported: it covers all tokens, and sparse "
                "layers route kept tokens only. Set DPOConfig(router_aux_loss_coef=0.0)."
            )
        _check_adapters(model)
        self._switches = switches_of(model)
        lemo = super()._apply_lemo(model, config, predictor)
        lemo.passes.pairs = self._pairs
        reference = None if self._pairs.fixed else self._reference()
        if reference is not None and self._follower(reference) is None:
            if config.fp8:
                reference.requires_grad_(False)  # products with weights that train are in bf16
            follower = take_over(reference, _following(config))
            if len(follower.rules) != len(lemo.rules):
                raise ValueError(
                    f"ref_model has {len(follower.rules)} layers and the model {len(lemo.rules)}: "
                    "each layer of the reference keeps what the same layer of the model keeps. "
                    "Give a ref_model with as many layers, or none."
                )
            follower.passes.pairs = self._pairs
        return lemo

    def _reference(self) -> nn.Module | None:
        """The separate model of the reference, or None."""
        return None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)

    def _follower(self, reference: nn.Module) -> LeMo | None:
        """The LeMo on the reference's separate model."""
        lemo = lemo_of(reference)
        return lemo if lemo is not None and lemo.passes.pairs is self._pairs else None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As DPOTrainer's; the reference's pass is sparse if the trained model's is."""
        lemo, reference = lemo_of(self._model()), self._reference()
        follower = None if reference is None else self._follower(reference)
        if lemo is not None and follower is not None:
            follower.set_fp8(lemo.passes.in_fp8)  # both round alike
        try:
            with quickly_disabled(self._model(), self._switches):
                return super().compute_loss(*args, **kwargs)
        finally:
            self._pairs.latest = None
            if follower is not None:
                follower.passes.drop()

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As DPOTrainer's; for rows that train by sparse passes, in files of their own."""
        if self.lemo_config is None or dataset is not self.train_dataset:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        known = self._precompute_model_hash
        self._precompute_model_hash = f"{known} {self.lemo_config.to_dict()}"
        try:
            with _alone(self._reference() or self._model(), self.lemo_config):
                return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = known


@contextmanager
def _alone(model: nn.Module, config: LeMoConfig) -> Iterator[None]:
    """Within this context passes of ``model`` without gradient are the reference's, without a pass
    of the trained model before them."""
    _check_adapters(model)
    pairs = PairSets(fixed=True, alone=True)
    take_over(model, config).passes.pairs = pairs
    try:
        yield
    finally:
        pairs.alone = False
        remove_lemo(model)


def _following(config: LeMoConfig) -> LeMoConfig:
    """``config`` for a model that does not choose blocks and is not trained."""
    policy = "pooled" if config.policy == "predictor" else config.policy
    return replace(
        config,
        policy=policy,
        random_share=None if policy == "pooled" else config.random_share,
        predictor=None,
        predictor_revision=None,
        recompute=None,
        offload_gib=None,
        cuda_graphs=False,
    )


def _check(args: Any, config: LeMoConfig) -> None:
    """Raises ValueError if trained model and reference could not read the same tokens."""
    if args.truncation_mode != "keep_start" and args.max_length is not None:
        raise ValueError(
            f"truncation_mode={args.truncation_mode!r} cuts the prompt at a different place for "
            "each completion, and the two cannot keep the same prompt tokens then. Set it to "
            "'keep_start', or max_length=None."
        )
    if config.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence_parallel_size={config.sequence_parallel_size}: it needs the model's own "
            "loss, and DPO uses TRL's. Set it to 1."
        )
    if config.fp8 and args.sync_ref_model:
        raise ValueError(
            "fp8=True and sync_ref_model=True: FP8 copies are made of weights that stay, and TRL "
            "changes the reference's in a way that nobody can notice. Set one of them to False."
        )
    if not args.precompute_ref_log_probs:
        return
    if config.policy not in OF_TOKENS:
        raise ValueError(
            f"precompute_ref_log_probs=True and policy={config.policy!r}, which asks the model "
            "that is trained: its choice would differ from what the reference has read. Set "
            f"policy to one of {', '.join(map(repr, OF_TOKENS))}, or "
            "precompute_ref_log_probs=False."
        )
    if config.dense_finish:
        raise ValueError(
            f"precompute_ref_log_probs=True and dense_finish={config.dense_finish}, whose steps "
            "keep more than the reference has read. Set dense_finish=0, or "
            "precompute_ref_log_probs=False."
        )
    if config.fp8 and config.bf16_finish:
        raise ValueError(
            f"precompute_ref_log_probs=True, fp8=True and bf16_finish={config.bf16_finish}: the "
            "reference is computed in FP8, and the last steps are not. Set bf16_finish=0, or "
            "precompute_ref_log_probs=False."
        )


def _check_adapters(model: nn.Module) -> None:
    """Raises ValueError for virtual tokens, which the model without its adapter does not have."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        if config.is_prompt_learning:
            name = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"PEFT's {name} is not supported for preferences: it puts virtual tokens before "
                "the prompt, and the reference has none. Use LoRA."
            )
