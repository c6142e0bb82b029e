"""Whole tensors out of what ranks have divided, put together on the first rank, and parts of them back in.

A file holds whole tensors under the whole weights' names, so that a run resumes on any number of ranks, and what it
leaves is a model like any other. The first rank writes them one after the other, and has one of them in its memory at a
time: it says which it wants, each rank that has a part of it sends that, and so on until it says that it wants no more.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.models.memory_options import divided_weights, settle
from qlora_lite.quant.blockwise import BLOCK_VALUES

from .processes import Processes

_BY_BLOCK = "absmax"  # begins the names of states that have one value for so many of a weight's, bitsandbytes' own


@dataclass(frozen=True, slots=True)
class Layout:
    """Which values of each divided weight each rank has, and the weight's shape, by its name."""

    ranges: Mapping[str, tuple[range, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    def name_of(self, key: str) -> str | None:
        """Return the divided weight that a tensor of a file belongs to: itself, or a state of its optimizer."""
        return next((name for name in (key, key.rpartition(".")[0]) if name in self.ranges), None)

    def shape_of(self, key: str, is_number: bool) -> tuple[int, ...]:
        """Return the shape of a whole tensor.

        Args:
            is_number: it has one value whatever the weight has.
        """
        name = self.name_of(key)
        assert name is not None
        if is_number:
            return ()
        if self._by_block(key, name):
            return (-(-torch.Size(self.shapes[name]).numel() // BLOCK_VALUES),)
        return self.shapes[name]

    def slices_of(self, key: str, is_number: bool) -> list[slice | None]:
        """Return what each rank has of a whole tensor's values, None where that is nothing; of a number the first rank
        that has any part."""
        name = self.name_of(key)
        assert name is not None
        found: list[slice | None] = []
        for values in self.ranges[name]:
            start, stop = values.start, values.stop
            if not values or (is_number and any(found)):
                found.append(None)
            elif is_number:
                found.append(slice(0, 1))
            elif self._by_block(key, name):
                found.append(slice(start // BLOCK_VALUES, -(-stop // BLOCK_VALUES)))
            else:
                found.append(slice(start, stop))
        return found

    @staticmethod
    def _by_block(key: str, name: str) -> bool:
        return key.removeprefix(name).startswith(f".{_BY_BLOCK}")


def layout_of(method: AdapterMethod, model: nn.Module) -> Layout:
    """Return how a model's weights are divided; it has none where they are whole."""
    weights = divided_weights(model)
    settle(model)
    named = [(name, parameter) for name, parameter in method.parameters(model) if parameter in weights]
    return Layout(
        {name: weights[parameter].ranges for name, parameter in named},
        {name: tuple(parameter.shape) for name, parameter in named},
    )


def parts_here(layout: Layout, rank: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a rank's parts of the whole tensors of a file, flat, and the tensors that are not divided."""
    found = {}
    for key, tensor in tensors.items():
        name = layout.name_of(key)
        if name is None:
            found[key] = tensor
        elif layout.ranges[name][rank]:
            is_number = not tensor.dim() and bool(layout.shapes[name])
            part = layout.slices_of(key, False)[rank]
            found[key] = tensor if is_number else tensor.reshape(-1)[part]
    return found


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that is put together when it is asked for."""

    collection: "Collection"
    file: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def cpu(self) -> torch.Tensor:
        """Return the tensor, in host memory."""
        return self.collection.collect(self)


@dataclass(slots=True)
class Collection:
    """The tensors of files, parts of which lie on several ranks; each makes one of its own at the same time.

    On the first rank ``tensors`` are whole, or put together when ``cpu()`` asks for them, until ``end``; the others
    ``serve`` meanwhile. ``numbers`` are those of all ranks' parts.

    Args:
        here: this rank's tensors by file and key: parts, flat, of what the layout divides.
        numbers_here: further facts by the name of a weight.
    """

    processes: Processes
    layout: Layout
    here: Mapping[str, Mapping[str, torch.Tensor]]
    numbers_here: Mapping[str, dict]
    tensors: dict[str, dict[str, Any]] = field(init=False)
    numbers: dict[str, dict] = field(init=False)

    def __post_init__(self):
        kinds = {
            file: {
                key: (str(t.dtype).removeprefix("torch."), not t.dim())
                for key, t in tensors.items()
                if self.layout.name_of(key)
            }
            for file, tensors in self.here.items()
        }
        said = json.dumps([kinds, self.numbers_here])
        self.tensors, self.numbers = {file: dict(tensors) for file, tensors in self.here.items()}, {}
        for rank in range(self.processes.world_size):
            kinds, numbers = json.loads(self.processes.tell(said, rank))
            self.numbers = numbers | self.numbers
            for file, each in kinds.items():
                for key, (dtype, is_number) in each.items():
                    shape = self.layout.shape_of(key, is_number)
                    self.tensors[file][key] = Whole(self, file, key, getattr(torch, dtype), shape)

    def collect(self, whole: Whole) -> torch.Tensor:
        """Put a tensor together on the first rank."""
        self.processes.tell(json.dumps([whole.file, whole.key, whole.shape == ()]))
        found = torch.empty(whole.shape, dtype=whole.dtype)
        for rank, part in enumerate(self.layout.slices_of(whole.key, whole.shape == ())):
            if part is None:
                continue
            place = found.view(-1)[part]
            if rank == self.processes.rank:
                place.copy_(self.here[whole.file][whole.key].view(-1))
            else:
                self.processes.collect(place.view(torch.uint8), rank)
        return found

    def serve(self) -> None:
        """Hand in what the first rank asks for, until it has all that it wants."""
        while said := self.processes.tell(""):
            file, key, is_number = json.loads(said)
            slices, rank = self.layout.slices_of(key, is_number), self.processes.rank
            if rank < len(slices) and slices[rank] is not None:  # of the first machine: all have the same parts
                tensor = self.here[file][key].detach().cpu().contiguous().view(-1)
                self.processes.hand_in(tensor.view(torch.uint8))

    def end(self) -> None:
        """Say on the first rank that no more is wanted."""
        self.processes.tell("")
