"""What CUDA graphs rely on of a model: where its weights are, and how it calls its modules."""

from torch import Tensor, nn


class Watched:
    """State of a model that graphs rely on. It is read at each batch, so its parts are looked up
    once.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        parts = list(model.modules())
        self._children = [part._modules for part in parts]
        self._tensors = [held for part in parts for held in (part._parameters, part._buffers)]
        self._layers = [part for part in parts if hasattr(part, "gradient_checkpointing")]
        self._adapted = [vars(part) for part in parts if "merged_adapters" in vars(part)]
        scalings = [part.get("scaling") for part in self._adapted]  # which graphs multiply by
        self._scalings = [x for x in scalings if isinstance(x, dict)]

    def state(self) -> list:
        """The model's modules; the places of its weights and buffers, and which are trained; which
        layers are checkpointed; and which adapters are active or merged, and their scaling. Graphs
        are valid as long as it is equal."""
        state: list = [layer.gradient_checkpointing for layer in self._layers]
        for part in self._adapted:  # PEFT lengthens the list in place
            state += part["merged_adapters"]
            state += part.get("_disable_adapters"), part.get("_active_adapter")
        for scaling in self._scalings:
            state += scaling.values()
        state += [id(part) for children in self._children for part in children.values()]
        for held in self._tensors:
            for tensor in held.values():
                if tensor is not None:
                    # Subclasses of tensors may have no memory of their own.
                    plain = type(tensor) in (Tensor, nn.Parameter)
                    state += (id(tensor), tensor.data_ptr() if plain else 0, tensor.requires_grad)
        return state
