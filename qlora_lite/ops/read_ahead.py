"""Read the weights of blocks from memory-mapped files into pinned memory, a block or two before they are needed.

What a process maps of a file comes from the disk when it is first touched, and is dropped again when memory is short.
A card cannot copy it beside its computation, since it is not pinned; so a thread copies a block into one of two pinned
buffers, which is when the disk is read, while the card computes, and from there it goes to the card as any other.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from qlora_lite.memory.marks import category

from .offload import SideStream, host_memory

BUFFERS = 2  # one is read into while the other goes to the device


class ReadAhead:
    """Bring blocks from where they lie to the device, by way of pinned buffers.

    Args:
        fills: for each block, a function that copies it to the begin of a buffer.
        sizes: of the blocks, in bytes.
        side: the stream of the copies to the device.
    """

    def __init__(self, fills: Sequence[Callable[[torch.Tensor], None]], sizes: Sequence[int], side: SideStream):
        self._fills, self._sizes, self._side = fills, sizes, side
        self.buffers = [host_memory(max(sizes), side.device) for _ in range(BUFFERS)]
        self._last_copy: list[object] = [None] * BUFFERS  # the end of the last copy from each
        self._next = 0  # buffer, in turn
        self._reading: dict[int, tuple[int, Future | None]] = {}  # by block: its buffer, and when it is whole
        # A plan's tensors have no values, and no time.
        self._executor = None if side.device.type == "meta" else ThreadPoolExecutor(1, "qlora_lite read ahead")

    def begin(self, number: int) -> None:
        """Begin to read a block; what was read into the buffer that is next and never brought is forgotten."""
        if number in self._reading:
            return
        here, self._next = self._next, (self._next + 1) % BUFFERS
        self._reading = {block: reading for block, reading in self._reading.items() if reading[0] != here}
        self._side.wait_on_host(self._last_copy[here])
        self._reading[number] = here, self._read(number, self.buffers[here])

    def _read(self, number: int, buffer: torch.Tensor) -> Future | None:
        if self._executor is not None:
            return self._executor.submit(self._fills[number], buffer)
        with category("on disk"):  # no tensor is born here; the mark tells a ``WorkCounter`` what the disk gives
            self._fills[number](buffer)
        return None

    def bring(self, number: int, slot: torch.Tensor) -> object:
        """Copy a block to the begin of a slot on the device, when it has been read; return what to wait for."""
        self.begin(number)
        here, reading = self._reading.pop(number)
        if reading is not None:
            reading.result()
        size = self._sizes[number]
        self._last_copy[here] = self._side.copy([(slot[:size], self.buffers[here][:size])])
        return self._last_copy[here]
