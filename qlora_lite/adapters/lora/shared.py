"""LoRA layers that get the same input, computed together: q, k and v; gate and up.

One product with all A factors (x is read once, and 3 r columns suit a kernel better than r), and in backward one
gradient of x, to which the layers add in place, in place of one tensor for each that autograd adds up. Each layer's own
product with its frozen weight stays where it was.

A model's code calls its projections one by one, so the first call of a set begins for all of them, and the others take
what it left (``layer``). A set whose layers are not called so after all falls apart, and each computes by itself.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .layer import Begun, LoraLinear, begin

SETS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # in the order in which models call them


class SharedInput:
    """LoRA layers of one rank, scale and type, called in order with the same input; each holds its set."""

    def __init__(self, layers: Sequence[LoraLinear]):
        self.layers = tuple(layers)
        self._begun: Begun | None = None
        for layer in self.layers:
            layer.shared = self

    def begun_for(self, layer: LoraLinear, x: torch.Tensor) -> tuple[Begun, int]:
        """Return the products that the first layer began for all, and which of them is this layer's."""
        number = self.layers.index(layer)
        if number == 0:
            self._begun = begin(x, self.layers)
        begun = self._begun
        if begun is None or begun.x is not x:
            self.fall_apart()
            return begin(x, [layer]), 0
        if number == len(self.layers) - 1:
            self._begun = None
        return begun, number

    def forget(self) -> None:
        """Drop what the first layer began."""
        self._begun = None

    def fall_apart(self) -> None:
        """Let each layer compute by itself."""
        self.forget()
        for layer in self.layers:
            layer.shared = None


def share_inputs(model: nn.Module) -> None:
    """Compute the sets of a model's projections together that can be."""
    for module in model.modules():
        for names in SETS:
            found = (getattr(module, name, None) for name in names)
            layers = [layer for layer in found if isinstance(layer, LoraLinear)]
            if len(layers) == len(names) and _alike(layers):
                SharedInput(layers)  # held by its layers


def forget_begun(model: nn.Module) -> None:
    """Drop what a forward pass that broke off left between the layers of a set."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.shared is not None:
            module.shared.forget()


def _alike(layers: Sequence[LoraLinear]) -> bool:
    kinds = {
        (layer.rank, layer.scale, layer.lora_A.dtype, layer.lora_A.shape[1], layer.merging is None) for layer in layers
    }
    return len(kinds) == 1 and not any(layer.dropout for layer in layers)
