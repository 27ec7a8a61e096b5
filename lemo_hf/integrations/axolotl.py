"""`LeMoPlugin`: LeMo in an Axolotl config.

plugins:
  - lemo_hf.integrations.axolotl.LeMoPlugin
lemo:
  retention: 0.5
  dense_first_layers: 4
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from lemo_hf.config import LeMoConfig
from lemo_hf.integrations.callback import LeMoCallback

# Keys of an Axolotl config that go against a sparse pass, and what to do instead.
REFUSED = {
    "rl": "preference losses compare with a reference model: train it without the plugin",
    "orpo_alpha": "its loss reads the logits of every token: leave it unset",
    "activation_offloading": "set `lemo: {offload_gib: ...}` instead",
    "layer_offloading": "it moves layers behind LeMo's back: leave it unset",
}


class LeMoArgs(BaseModel):
    """LeMo's part of an Axolotl config.

    Attributes:
        lemo: Fields of `LeMoConfig`.
    """

    lemo: dict[str, Any] | None = None

    @field_validator("lemo")
    @classmethod
    def _fields_of_a_lemo_config(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        LeMoConfig.from_dict(values or {})
        return values


class LeMoPlugin(BasePlugin):
    """Makes the training passes of Axolotl's supervised trainer sparse."""

    _callback: LeMoCallback | None = None

    def get_input_args(self) -> str:
        """Import path at which Axolotl finds `LeMoArgs`."""
        return f"{LeMoArgs.__module__}.{LeMoArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[LeMoCallback]:
        """The callbacks of the trainer that is about to be made: a `LeMoCallback`.

        Raises:
            ValueError: A key of the config does not work with sparse passes.
        """
        check_axolotl(cfg)
        self._callback = LeMoCallback(LeMoConfig.from_dict(dict(cfg.lemo or {})))
        return [self._callback]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Write what trained into the card, which Axolotl has made anew after training."""
        if self._callback is not None:
            self._callback.add_to_card(cfg.output_dir)


def check_axolotl(cfg: Any) -> None:
    """Raises ValueError for keys of an Axolotl config that do not work with LeMo."""
    for key, way_out in REFUSED.items():
        if cfg.get(key):
            raise ValueError(f"{key}: {cfg[key]} is not supported with LeMoPlugin: {way_out}.")
    if cfg.get("sample_packing") and not cfg.get("attn_decontaminates_packing"):
        raise ValueError(
            f"sample_packing: true with attn_implementation: {cfg.get('attn_implementation')} "
            "gives the model one attention mask for all documents of a row, and LeMo cannot tell "
            "the documents apart: use flash_attention_2, or sample_packing: false."
        )
