"""A block's tensors one behind the other in a flat buffer, so that one copy, or one exchange, moves all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

# Bytes; what vector loads and copies of any device are content with, and what a plan counts in. It is also what a block
# of 8-bit optimizer states has in float32, so that no two ranks that divide a weight have parts of the same one.
ALIGNMENT = 1024


@dataclass(slots=True)
class Place:
    """Where one tensor of a block is registered, and where it lies in a flat buffer."""

    registry: dict[str, torch.Tensor | None]
    name: str
    start: int
    tensor: torch.Tensor  # while the block is not on the device

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the tensor's place in a flat buffer."""
        size = self.tensor.nbytes
        return flat[self.start : self.start + size].view(self.tensor.dtype).view(self.tensor.shape)

    def shown(self, flat: torch.Tensor) -> torch.Tensor:
        """Return what stands for the tensor in a module while it lies in a flat buffer."""
        found = self.view(flat)
        return nn.Parameter(found, self.tensor.requires_grad) if isinstance(self.tensor, nn.Parameter) else found


class FlatBlock:
    """The tensors of a block, one behind the other in any flat buffer of ``size`` bytes or more.

    Args:
        trains: those that are trained, too; else the frozen ones.
        leave: given the place of a trained tensor and its copy in a slot, which has a gradient.
    """

    def __init__(
        self,
        block: nn.Module,
        trains: bool = False,
        leave: Callable[["Place", nn.Parameter], None] | None = None,
    ):
        self.places, self.size, self._leave = [], 0, leave
        for registry, name, tensor in _tensors(block, trains):
            self.places.append(Place(registry, name, self.size, tensor))
            self.size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def fill(self, flat: torch.Tensor) -> None:
        """Copy the tensors to a buffer."""
        for place in self.places:
            place.view(flat).copy_(place.tensor.detach())

    def fill_part(self, part: torch.Tensor, start: int) -> None:
        """Copy to a buffer what lies behind a byte of one for the whole block, and read nothing else."""
        for place in self.places:
            first, last = max(start, place.start), min(start + len(part), place.start + place.tensor.nbytes)
            if first < last:
                source = place.tensor.detach().contiguous().view(-1).view(torch.uint8)
                part[first - start : last - start].copy_(source[first - place.start : last - place.start])

    def move(self, flat: torch.Tensor) -> None:
        """Let the tensors lie in a buffer for good."""
        self.fill(flat)
        for place in self.places:
            if place.tensor.requires_grad:  # the optimizer's: it stays the same object
                place.tensor.data = place.view(flat)
            else:
                place.tensor = place.shown(flat)
        self.show(None)

    def show(self, flat: torch.Tensor | None) -> None:
        """Let the block's modules see a copy in a slot, or where the tensors lie."""
        for place in self.places:
            shown = place.tensor if flat is None else place.shown(flat)
            if flat is not None and shown.requires_grad:
                shown.register_post_accumulate_grad_hook(partial(self._leave, place))
            place.registry[place.name] = shown


def _tensors(block: nn.Module, trains: bool) -> Iterator[tuple[dict, str, torch.Tensor]]:
    for module in block.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None and (trains or not tensor.requires_grad) and tensor.numel():
                    yield registry, name, tensor
