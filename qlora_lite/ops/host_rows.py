"""A weight in host memory whose rows come to the device a slice at a time, the next slice beside the computation.

For an output head: the chunked loss asks for a few thousand words after the other (``ops.loss``), multiplies them twice
and is done with them. Two slices are on the device at a time.

On a card, slices come on a stream of their own from pinned memory. Elsewhere the same code takes the memory for the
next slice and copies when it is asked for, so that plans and tests see what a card has.
"""

import torch

from qlora_lite.memory.marks import category, marks

from .offload import Arrival, SideStream
from .transfer import on_host, sent


class HostRows:
    """The rows of a weight [V, D] on a device: ``rows[a:b]`` in rising order, or ``rows[numbers]``.

    Args:
        weight: in host memory, pinned beside a card.
        device: where the rows are wanted.
    """

    def __init__(self, weight: torch.Tensor, device: torch.device):
        self.weight, self.shape, self.side = weight, weight.shape, SideStream(device)
        self._coming: Arrival | None = None

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(rows, torch.Tensor):
            return sent(self.weight[on_host(rows, self.weight.device)], self.side.device)
        start, stop, _ = rows.indices(len(self.weight))
        here, self._coming = self._coming, None
        if here is not None and here.of != slice(start, stop):  # asked for out of order, or a step broke off
            self.side.wait(here.event)
            here = None
        here = here or self._begin(start, stop)
        (tensor,) = here.tensors
        if self.side.stream is None:
            self.side.copy([(tensor, self.weight[start:stop])])
        self.side.wait(here.event)
        if stop < len(self.weight) and marks.repeats == 1:  # a plan's piece that stands for others may be the last
            self._coming = self._begin(stop, min(2 * stop - start, len(self.weight)))
        return tensor

    def _begin(self, start: int, stop: int) -> Arrival:
        """Take the memory for a slice, and begin its copy where there is a stream for it."""
        rows = slice(start, stop)
        with category("head"):
            tensor = self.weight.new_empty((stop - start, *self.shape[1:]), device=self.side.device)
        return Arrival(rows, [tensor], self.side.stream and self.side.copy([(tensor, self.weight[rows])]))
