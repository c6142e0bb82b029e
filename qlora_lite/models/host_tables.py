"""The table of embeddings and the output head while their weights stay in host memory.

Of a table only the rows of a batch come to the device. A head's come a slice at a time, the next slice beside the
computation: the chunked loss asks for a few thousand words after the other (``kernels.loss``), multiplies them twice
and is done with them. Two slices are on the device at a time.

On a GPU, slices come on a stream of their own from pinned memory. Elsewhere the same code takes the memory for the
next slice and copies when it is asked for, so that plans and tests see what a GPU has.
"""

import torch
from torch import nn

from qlora_lite.kernels.loss import Head, head_products
from qlora_lite.memory.marks import category, marks
from qlora_lite.memory.shapes import device_type
from qlora_lite.offload.around import Around
from qlora_lite.offload.offload import Arrival, SideStream, host_memory
from qlora_lite.offload.transfer import on_host, sent


class HostEmbedding(Around):
    """An embedding whose table stays in host memory; only the rows of the batch travel."""

    def __init__(self, inner: nn.Module, device: torch.device):
        super().__init__(inner)
        self.device = device

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return sent(self.inner(on_host(input_ids, self.weight.device)), self.device)


class HostHead(Around):
    """A linear head whose weight [V, D] stays in host memory; ``rows`` brings it a few thousand words at a time."""

    def __init__(self, inner: nn.Linear, device: torch.device):
        super().__init__(inner)
        self.device = device
        if device_type(device) == "cuda":
            memory = host_memory(self.weight.nbytes, device).view(self.weight.dtype).view(self.weight.shape)
            self.weight.data = memory.copy_(self.weight.data)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(device)
        self.rows = HostRows(self.weight, device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_products(hidden, Head(self.rows, self.bias))


class HostRows:
    """The rows of a weight [V, D] on a device: ``rows[a:b]`` in rising order, or ``rows[numbers]``.

    Args:
        weight: in host memory, pinned beside a GPU.
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
