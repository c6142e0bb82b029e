"""Weights that are trained and divided among ranks: each has a part of them, of their gradients and optimizer states.

A block's weights lie flat, as frozen ones do that are divided (``stream.OnAllRanks``), and each rank has an equal range
of those bytes on its device. What lies of a weight in that range is a parameter of its own, flat, which the optimizer
updates where it lies. Ranges begin at multiples of 256 values of a weight (``ALIGNMENT``): AdamW and Lion work value by
value, and 8-bit states in blocks of 256 values, so that parts become what the whole weight would. An all-gather puts a
block together in a slot, in forward and again in backward; the copies' gradients go to the ranks that have the parts
(``gradients.ToOwners``), after each micro-batch, so that they add up there. A rank holds 1 / N of the blocks' weights,
gradients and states, two slots and one block's gradients. Embeddings, head and what else lies outside of blocks are
whole on each rank: their gradients are added up once a step, as those of whole models are. So are those of parts
between several machines, each of which has all parts.

In the place of a divided weight a module holds a placeholder of its shape and type without memory, all of whose values
are not numbers: what reads it by mistake finds out.

torch's ``fully_shard`` is the known other way, with ``torch.distributed.checkpoint`` for what is divided. It was not
taken. It divides a tensor by rows, which may cut an 8-bit state's block of 256 values, and the parameters it leaves are
of a kind (``DTensor``) that neither the optimizers nor the ledger know. It has no plan without processes: torch's fake
process group is private. Gradients are added up in their own type, or all cast to float32 first. And a checkpoint of
it has a pickle (``.metadata``), which nothing here reads, and a part for each rank, where one file of whole tensors
resumes on any number of them, or on one.

Source: ZeRO's third stage, arXiv 1910.02054, section 5.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .flat_block import FlatBlock, Place
from .gradients import OwnPart, ToOwners
from .offload import SideStream
from .stream import OnAllRanks, Ranks


class Divided(NamedTuple):
    """How a weight is divided: the range of its values, in the order they lie in, that each rank has, and this rank's
    part [values], None where it has none; ``rank`` is this one."""

    ranges: tuple[range, ...]
    part: nn.Parameter | None
    rank: int


class TrainedOnAllRanks(OnAllRanks):
    """The placement of blocks that are trained and of which each rank has one part, all of one size.

    ``weights`` are the divided ones, which stand for themselves in modules while their block is nowhere whole.

    Args:
        blocks: see ``stream.PlacementFactory``, as is the next.
        ranks: all that have a part.
    """

    def __init__(self, blocks: Sequence[FlatBlock], side: SideStream, ranks: Ranks):
        super().__init__(blocks, side, ranks, [1] * ranks.count)
        self.in_files = False  # from here on no weight is what was loaded
        self.weights: dict[nn.Parameter, Divided] = {}
        own: list[list[OwnPart]] = []
        for block, part, (size, *_) in zip(blocks, self._parts, self._sizes, strict=True):
            own.append([])
            for place in block.places:
                if isinstance(weight := place.tensor, nn.Parameter) and weight.requires_grad:
                    here = [_lies_in(place, rank * size, (rank + 1) * size) for rank in range(ranks.count)]
                    parameter, found = None, here[ranks.rank]
                    if found.start < found.stop:
                        parameter = nn.Parameter(part[found].view(weight.dtype))
                        own[-1].append(OwnPart(parameter, found))
                    self.weights[weight] = Divided(_ranges(place, here, size), parameter, ranks.rank)
                    nothing = torch.full((), math.nan, dtype=weight.dtype, device=side.device)
                    weight.data = nothing.expand(weight.shape)
        self.gradients = ToOwners(blocks, [size for size, *_ in self._sizes], own, ranks, side)


def _lies_in(place: Place, start: int, stop: int) -> slice:
    """Return the bytes of the range [start, stop) of a flat buffer, counted from its start, that are a tensor's."""
    first, last = max(start, place.start), min(stop, place.start + place.tensor.nbytes)
    return slice(first - start, last - start) if first < last else slice(0, 0)


def _ranges(place: Place, here: Sequence[slice], size: int) -> tuple[range, ...]:
    """Return the values of a tensor that lie in each rank's bytes."""
    found, itemsize = [], place.tensor.itemsize
    for rank, part in enumerate(here):
        start = (rank * size + part.start - place.start) // itemsize
        count = (part.stop - part.start) // itemsize
        found.append(range(start, start + count) if count else range(0))
    return tuple(found)
