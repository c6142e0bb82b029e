"""Where the gradients of streamed weights go: to host memory, or to the ranks that have parts of the weights.

What a block computes with are copies in a slot, and their gradients must be gone before the slot is used again. A hook
gives each gradient to ``leave`` when it is whole; ``hand_over`` is called when another block begins, and at the end of
a backward pass. What is on its way then travels beside that block's computation.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import nn

from qlora_lite.memory.marks import category

from .flat_block import ALIGNMENT, FlatBlock, Place
from .offload import SideStream, host_memory

EXCHANGED_BYTES = 1 << 26  # of gradients that a rank sends at a time, and gets


class Gradients(Protocol):
    """Takes the gradients of streamed weights; ``waiting`` tells whether it has any that are not handed over."""

    @property
    def waiting(self) -> bool:
        """See above."""

    def leave(self, number: int, place: Place, copy: nn.Parameter) -> None:
        """Take the gradient of a weight's copy.

        Args:
            number: of the block whose backward pass this is.
        """

    def hand_over(self, before: int | None) -> None:
        """Give weights the gradients that have arrived.

        Args:
            before: the block that begins; None at the end of a backward pass, when all are given.
        """

    def forget(self) -> None:
        """Drop the gradients of a backward pass that broke off."""


class _Leaving(NamedTuple):
    """A gradient on its way to the host: the weight that it is for, itself here and there, and the end of its copy."""

    weight: nn.Parameter
    here: torch.Tensor | None
    there: torch.Tensor
    copied: object


class ToHost:
    """Copy gradients to host memory, where the weights are.

    At most two blocks' gradients are in host memory at one time, and one block's on the device.
    """

    def __init__(self, side: SideStream):
        self._side = side
        self._leaving: dict[int, list[_Leaving]] = {}  # by the block that they are of

    @property
    def waiting(self) -> bool:
        """See ``Gradients``."""
        return bool(self._leaving)

    def leave(self, number: int, place: Place, copy: nn.Parameter) -> None:
        """See ``Gradients``."""
        gradient, copy.grad = copy.grad, None
        memory = host_memory(gradient.nbytes, self._side.device)
        there = memory.view(gradient.dtype).view(gradient.shape)
        leaving = _Leaving(place.tensor, gradient, there, self._side.copy([(there, gradient)]))
        self._leaving.setdefault(number, []).append(leaving)

    def hand_over(self, before: int | None) -> None:
        """See ``Gradients``: those of blocks whose next but one begins, or of all."""
        for number in sorted(self._leaving, reverse=True):
            for leaving in self._leaving[number]:
                self._side.wait(leaving.copied)
            if before is not None and number <= before + 1:  # updated beside the block that is launched now
                self._leaving[number] = [leaving._replace(here=None) for leaving in self._leaving[number]]
                continue
            for weight, _, there, copied in self._leaving.pop(number):
                self._side.wait_on_host(copied)
                weight.backward(there)

    def forget(self) -> None:
        """See ``Gradients``."""
        for leaving in chain(*self._leaving.values()):
            self._side.wait(leaving.copied)
        self._leaving.clear()


class OwnPart(NamedTuple):
    """A parameter that is a rank's part of a weight, and the bytes of its part of the block that it is."""

    parameter: nn.Parameter
    bytes: slice


class Owners(Protocol):
    """The ranks that weights are divided among; see ``stream.Ranks``."""

    rank: int
    count: int

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Give each rank its row of a buffer [ranks, bytes], and get from each the row that it has for this one."""


class ToOwners:
    """Give each rank the sum of all ranks' gradients of its parts of a block's weights.

    A block's gradients are collected in one flat buffer, laid out as its weights are. When all are there, each rank
    gets from all others their gradients of its own part, and adds them up in float32, rounded once: what a
    reduce-scatter adds up in the gradients' own type would be rounded at every rank, and in another order with each
    algorithm. As many bytes are on the wire as in a reduce-scatter.

    Args:
        blocks: the weights.
        part_bytes: of each block, of every rank's part.
        own: this rank's parts of each block's weights.
        ranks: all that have parts.
        side: the stream of the exchange.
    """

    def __init__(
        self,
        blocks: Sequence[FlatBlock],
        part_bytes: Sequence[int],
        own: Sequence[Sequence[OwnPart]],
        ranks: Owners,
        side: SideStream,
    ):
        self._blocks, self._part_bytes, self._own, self._ranks, self._side = blocks, part_bytes, own, ranks, side
        with category("gradients"):
            self.buffer = torch.empty(ranks.count * max(part_bytes), dtype=torch.uint8, device=side.device)
        self._number: int | None = None  # of the block whose gradients are in the buffer, and not sent
        self._there: set[int] = set()  # the places that have theirs
        self._sent: object = None  # the end of the last exchange, which reads the buffer
        self._arriving: tuple[int, torch.Tensor] | None = None

    @property
    def waiting(self) -> bool:
        """See ``Gradients``."""
        return self._number is not None or self._arriving is not None

    def leave(self, number: int, place: Place, copy: nn.Parameter) -> None:
        """See ``Gradients``."""
        gradient, copy.grad = copy.grad, None
        if self._number is None:
            self._side.wait(self._sent)
            self._number, self._there = number, set()
        here = place.view(self.buffer)
        if place.start in self._there:
            here.add_(gradient)
        else:
            here.copy_(gradient)
            self._there.add(place.start)

    def hand_over(self, before: int | None) -> None:
        """See ``Gradients``: those of the block before the last one, or of all."""
        self._receive()
        if self._number is not None:
            self._send(self._number)
        if before is None:
            self._receive()

    def forget(self) -> None:
        """See ``Gradients``."""
        self._side.wait(self._sent)
        self._number = self._arriving = None

    def _send(self, number: int) -> None:
        for place in self._blocks[number].places:
            if place.tensor.requires_grad and place.start not in self._there:  # nothing of the batch has used it
                place.view(self.buffer).zero_()
        size = self._part_bytes[number]
        rows = self.buffer[: self._ranks.count * size].view(self._ranks.count, size)
        with category("gradients"):
            total = torch.empty(size, dtype=torch.uint8, device=self.buffer.device)
        self._sent = self._side.launch(partial(self._exchange, rows, total, self._own[number]))
        self._number, self._arriving = None, (number, total)

    def _exchange(self, rows: torch.Tensor, total: torch.Tensor, own: Sequence[OwnPart]) -> None:
        """Put the sums for this rank's part into ``total``, some at a time."""
        step = max(1, EXCHANGED_BYTES // (len(rows) * ALIGNMENT)) * ALIGNMENT
        for start in range(0, len(total), step):
            sent = rows[:, start : start + step].contiguous()
            received = torch.empty_like(sent)
            self._ranks.exchange(received, sent)
            for parameter, part in own:
                first, last = max(start, part.start), min(start + step, part.stop)
                if first < last:
                    values = received[:, first - start : last - start].view(parameter.dtype)
                    total[first:last].view(parameter.dtype).copy_(values.sum(0, dtype=torch.float32))

    def _receive(self) -> None:
        if self._arriving is None:
            return
        (number, total), self._arriving = self._arriving, None
        self._side.wait(self._sent)
        for parameter, part in self._own[number]:
            with category("gradients"):
                parameter.backward(total[part].view(parameter.dtype))
