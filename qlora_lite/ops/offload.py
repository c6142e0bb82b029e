"""Keep tensors in host memory between a block's forward and its backward.

The input of every block, 8 KiB a token and block for an 8B model, and as much again where attention's results are
kept, is all that checkpointing leaves on the device. It is not needed until the block's backward, so it goes to host
memory beside the computation of the next block and comes back beside the backward of the one after it: at any time the
device holds what is kept of at most two.

On a card, copies run on a stream of their own, to and from pinned memory (torch's own pool of it, so that no step
but the first allocates any) with the tensor's strides: between others torch makes one more copy on the device first
(ATen/native/cuda/Copy.cu). Elsewhere the same code copies at once: it frees nothing there, but plans and tests run what
a card runs. ``torch.autograd.graph.save_on_cpu`` copies on the computing stream and brings back late, so that the
device waits for the bus twice a block.

A tensor is dropped only after the computing stream was told to wait for its copy. Its memory is then reused in the
order of that stream, however far the process runs ahead of the card. (``record_stream`` would give the memory back
only when the process sees the end of the copy: a process that is blocks ahead would hold all of them.)

Source: ALST, arXiv 2506.13996, section 3.3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlora_lite.memory.marks import category


class SideStream:
    """A stream for copies beside the computation; on a device without streams, copies just happen."""

    def __init__(self, device: torch.device):
        self.device = device
        self.host = device if device.type == "meta" else torch.device("cpu")  # a plan's tensors have no memory at all
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> "torch.cuda.Event | None":
        """Copy each (target, source) after what the computation was given so far; return what to wait for."""
        with category("offloaded"):  # no tensor is born here; the mark tells a ``WorkCounter`` what takes the bus
            return self._copy(pairs)

    def _copy(self, pairs):
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: "torch.cuda.Event | None") -> None:
        """Let the computation go on only after a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class _Arrival(NamedTuple):
    """A block's tensors on the device, and the end of the copy that they are part of."""

    number: int
    tensors: list[torch.Tensor]
    event: "torch.cuda.Event | None"


class HostStore:
    """Tensors of numbered blocks in host memory, taken back in falling order.

    Args:
        device: where they come from and return to.
    """

    def __init__(self, device: torch.device):
        self.side = SideStream(device)
        self._stored: dict[int, list[torch.Tensor]] = {}
        self._leaving: _Arrival | None = None  # of the block that was put last
        self._coming: dict[int, _Arrival] = {}

    def put(self, number: int, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a block's tensors to the host; they stay on the device until the next block's are put."""
        self._let_go()
        tensors, pinned = [tensor.detach() for tensor in tensors], self.side.stream is not None
        with category("offloaded"):
            hosts = [torch.empty_like(tensor, device=self.side.host, pin_memory=pinned) for tensor in tensors]
        self._stored[number] = hosts
        self._leaving = _Arrival(number, tensors, self.side.copy(list(zip(hosts, tensors, strict=True))))

    def _let_go(self) -> None:
        """Drop what is on the device, and have the computation wait for its copies before it reuses the memory."""
        for arrival in (*self._coming.values(), *([self._leaving] if self._leaving else [])):
            self.side.wait(arrival.event)
        self._leaving = None
        self._coming.clear()  # empty, unless a step broke off

    def take(self, number: int) -> list[torch.Tensor]:
        """Return a block's tensors on the device, and begin to bring those of the block before it."""
        if self._leaving is not None and self._leaving.number == number:  # the last block's never left
            here, self._leaving = self._leaving, None
            del self._stored[number]
        else:
            here = self._coming.pop(number, None) or self._bring(number)
        if number - 1 in self._stored:
            self._coming[number - 1] = self._bring(number - 1)
        self.side.wait(here.event)
        return here.tensors

    def _bring(self, number: int) -> "_Arrival":
        hosts = self._stored.pop(number)
        with category("saved activations"):
            tensors = [torch.empty_like(host, device=self.side.device) for host in hosts]
        return _Arrival(number, tensors, self.side.copy(list(zip(tensors, hosts, strict=True))))
