"""A model's output whose logits are made only when they are read."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, is_grad_enabled
from transformers.utils import ModelOutput

_LOGITS = "_lemo_logits"


class Logits:
    """Logits of one pass.

    Args:
        make: Function that makes the logits, and holds the stream. None: they cannot be made.
        why_not: Message of the error if logits are read that cannot be made (any more).
    """

    def __init__(self, make: Callable[[], Tensor] | None, why_not: str):
        self._make, self._why_not = make, why_not
        self._made: tuple[Tensor, bool] | None = None  # and whether gradients were wanted

    def __call__(self) -> Tensor:
        again = self._made is None or (is_grad_enabled() and not self._made[1])
        if again and self._make is not None:
            self._made = self._make(), is_grad_enabled()
        if self._made is None:
            raise RuntimeError(self._why_not)
        return self._made[0]

    def go_with(self, loss: Tensor) -> None:
        """Free the stream when the backward of ``loss`` begins, since it would add to the peak
        memory."""
        if not loss.requires_grad:
            return
        itself = ref(self)

        def forget(_: Tensor) -> None:
            logits = itself()
            if logits is not None:
                logits._make = None

        loss.register_hook(forget)


# A mixin has no base of its own; type checkers are told whose methods it stands before.
if TYPE_CHECKING:
    _Mixed = ModelOutput
else:
    _Mixed = object


class _AsksForLogits(_Mixed):
    """Mixin before an output's class.

    Its value for logits is the `Logits` object. So logits survive when an output is made anew from
    its items, as accelerate does in mixed precision, and FSDP.
    """

    loss: Tensor

    @property
    def logits(self) -> Tensor | None:
        held = vars(self).get(_LOGITS)
        return held() if isinstance(held, Logits) else held

    @logits.setter
    def logits(self, value: Tensor | Logits | None) -> None:
        vars(self)[_LOGITS] = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.items())})"  # making no logits

    def get(self, key: Any, default: Any = None) -> Any:
        return self.logits if key == "logits" else super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.logits if key == "logits" else super().__getitem__(key)
        return self.loss if key == 0 else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        rest = (value for name, value in self.items() if name not in ("loss", "logits"))
        return self.loss, self.logits, *rest


@cache
def _asking_class(base: type) -> type:
    # FSDP2 looks for tensors in all fields of an output: it is not who asks.
    fields = dict(vars(base)["__dataclass_fields__"])
    del fields["logits"]
    names = {"__dataclass_fields__": fields}
    return type(f"{base.__name__}AskedForLogits", (_AsksForLogits, base), names)


def with_logits(output: ModelOutput, loss: Tensor, logits: Logits) -> ModelOutput:
    """``output`` with ``loss``, and ``logits`` in place of its own."""
    rest = {name: x for name, x in output.items() if name not in ("loss", "logits")}
    output = _asking_class(stock_class(output))(loss=loss, **rest)
    output["logits"] = logits
    return output


def stock_class(output: ModelOutput) -> type:
    """The class of ``output`` before `with_logits`."""
    kind = type(output)
    return kind.__mro__[2] if issubclass(kind, _AsksForLogits) else kind
