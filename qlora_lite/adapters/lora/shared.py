"""LoRA layers that get the same input, computed together: q, k and v; gate and up.

One product with all A factors (x is read once, and 3 r columns suit a kernel better than r), and in backward one
gradient of x, to which the layers add in place, in place of one tensor for each that autograd adds up. Each layer's own
product with its frozen weight stays where it was.

A model's code calls its projections one by one, so the first call of a set begins for all of them, and the others take
what it left (``layer.SharedInput``). A set whose layers are not called so after all falls apart, and each computes by
itself.
"""

from collections.abc import Sequence

from torch import nn

from .layer import LoraLinear, SharedInput

SETS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # in the order in which models call them


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
