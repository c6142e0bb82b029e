"""Keep tensors in host memory between a block's forward and its backward.

The input of every block, 8 KiB a token and block for an 8B model, is all that checkpointing leaves on the device.
It is not needed until the block's backward, so it goes to host memory beside the computation of the next block
and comes back beside the backward of the one after it: at any time the device holds the inputs of at most two.

On a card, copies run on a stream of their own, to and from pinned memory (torch's own pool of it, so that no step
but the first allocates any). Elsewhere the same code copies at once: it frees nothing there, but plans and tests
run what a card runs. ``torch.autograd.graph.save_on_cpu`` copies on the computing stream and brings back late, so
that the device waits for the bus twice a block.

Source: ALST, arXiv 2506.13996, section 3.3.
"""

from collections.abc import Sequence

import torch

from qlora_lite.memory.marks import category


class SideStream:
    """A stream for copies beside the computation; on a device without streams, copies just happen."""

    def __init__(self, device: torch.device):
        self.device = device
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
                for tensor in (target, source):
                    if tensor.is_cuda:
                        tensor.record_stream(self.stream)  # its memory may be reused only after the copy
            return self.stream.record_event()

    def wait(self, event: "torch.cuda.Event | None") -> None:
        """Let the computation go on only after a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class HostStore:
    """Tensors of numbered blocks in host memory, taken back in falling order.

    Args:
        device: where they come from and return to.
    """

    def __init__(self, device: torch.device):
        self.side = SideStream(device)
        self._stored: dict[int, list[torch.Tensor]] = {}
        self._coming: dict[int, tuple[list[torch.Tensor], torch.cuda.Event | None]] = {}

    def put(self, number: int, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a block's tensors to the host; the caller may drop them."""
        pinned = self.side.stream is not None
        with category("offloaded"):
            hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in tensors]
        self.side.copy([(host, tensor.detach()) for host, tensor in zip(hosts, tensors, strict=True)])
        self._stored[number] = hosts

    def take(self, number: int) -> list[torch.Tensor]:
        """Return a block's tensors on the device, and begin to bring those of the block before it."""
        tensors, event = self._coming.pop(number, None) or self._bring(number)
        if number - 1 in self._stored:
            self._coming[number - 1] = self._bring(number - 1)
        self.side.wait(event)
        return tensors

    def _bring(self, number: int) -> tuple[list[torch.Tensor], "torch.cuda.Event | None"]:
        hosts = self._stored.pop(number)
        with category("saved activations"):
            tensors = [torch.empty(host.shape, dtype=host.dtype, device=self.side.device) for host in hosts]
        return tensors, self.side.copy(list(zip(tensors, hosts, strict=True)))
