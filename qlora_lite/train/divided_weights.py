"""What a rank trains of weights that ranks have divided (``offload.divided``), under the whole weights' names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.models.memory_options import divided_weights

from .processes import Processes


@dataclass(frozen=True)
class Parts:
    """What an optimizer has to know of parameters that are parts of weights: how many values each one's whole weight
    has, and which of how many ranks this is."""

    values: Mapping[torch.Tensor, int] = field(default_factory=dict)
    rank: int = 0
    count: int = 1


def parts_of(model: nn.Module) -> Parts:
    """Return what an optimizer has to know of this rank's parts of a model's weights; none where they are whole."""
    weights = divided_weights(model)
    values = {each.part: weight.numel() for weight, each in weights.items() if each.part is not None}
    for each in weights.values():
        return Parts(values, each.rank, len(each.ranges))
    return Parts()


def trained_here(method: AdapterMethod, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what this rank trains at present by its names: of divided weights its parts, if it has any."""
    weights, found = divided_weights(model), {}
    for name, parameter in method.parameters(model):
        part = weights[parameter].part if parameter in weights else parameter
        if part is not None:
            found[name] = part
    return found


def tensors_here(method: AdapterMethod, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what this rank has of all that a run trains, by its names; writing into it changes the model."""
    weights, here = divided_weights(model), dict(method.tensors(model))
    for name, parameter in method.parameters(model) if weights else ():
        if parameter in weights:
            part = weights[parameter].part
            here |= {name: part.detach()} if part is not None else {}
            if part is None:
                del here[name]
    return here


def fill_here(method: AdapterMethod, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors of the names and shapes of ``tensors_here`` into a model."""
    for name, tensor in tensors_here(method, model).items():
        tensor.copy_(tensors[name])


def norms_of_all(
    model: nn.Module, parameters: Sequence[nn.Parameter], norms: torch.Tensor, processes: Processes
) -> torch.Tensor:
    """Return the L2 norms of gradients, float32 [n]: those of whole weights, then of the divided ones in their order.

    Args:
        parameters: this rank's, whole ones first.
        norms: of their gradients.
    """
    weights = divided_weights(model)
    if not weights:
        return norms
    numbers = {each.part: number for number, each in enumerate(weights.values()) if each.part is not None}
    whole = len(parameters) - len(numbers)
    squares = torch.zeros(len(weights), dtype=torch.float32, device=norms.device)
    if processes.rank < parts_of(model).count:  # of the first machine: all have the same parts
        squares[[numbers[part] for part in parameters[whole:]]] = norms[whole:].square()
    processes.add_up([squares])
    return torch.cat([norms[:whole], squares.sqrt()])


def names_of_norms(method: AdapterMethod, model: nn.Module) -> list[str]:
    """Return the names of what ``norms_of_all`` gives the norms of."""
    weights = divided_weights(model)
    names = {parameter: name for name, parameter in method.parameters(model)}
    return [name for parameter, name in names.items() if parameter not in weights] + [names[w] for w in weights]
