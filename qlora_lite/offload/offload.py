"""Keep tensors in host memory between a block's forward and its backward.

The input of every block, 8 KiB a token and block for an 8B model, and as much again where attention's results are
kept, is all that checkpointing leaves on the device. It is not needed until the block's backward, so it goes to host
memory beside the computation of the next block and comes back beside the backward of the one after it: at any time the
device holds what is kept of at most two.

On a GPU, copies run on a stream of their own, to and from pinned memory. torch's pool of it gives whole powers of two
(ATen/core/CachingHostAllocator.h), up to twice what is asked for: a block's tensors lie one after the other in a few
parts of such sizes, at most a fifteenth more than they need, and those of the next block behind them. The parts stay
for the next step, so that only a step that needs more than any before takes some. Elsewhere the same code copies at
once: it frees nothing there, but plans and tests run what a GPU runs. ``torch.autograd.graph.save_on_cpu`` copies on
the computing stream and brings back late, so that the device waits for the bus twice a block.

A tensor is dropped only after the computing stream was told to wait for its copy. Its memory is then reused in the
order of that stream, however far the process runs ahead of the GPU. (``record_stream`` would give the memory back
only when the process sees the end of the copy: a process that is blocks ahead would hold all of them.)

Where the host has no room for them, they lie in files on a disk that the process sees as memory: the operating system
writes them beside the computation, and keeps of them what it has room for. Such memory is not pinned: the device waits
during each copy.

Source: ALST, arXiv 2506.13996, section 3.3.
"""

import logging
import mmap
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch

from qlora_lite.errors import OutputError
from qlora_lite.memory.marks import category
from qlora_lite.memory.shapes import device_type
from qlora_lite.units import format_bytes

log = logging.getLogger("qlora_lite")
MAX_PARTS = 4  # of the memory for a block's tensors; the last one is rounded up: at most a fifteenth too much
REFUSALS = "out of memory", "OS call failed"  # of cudaHostAlloc; the second of some kernels of Linux (cupy issue 8733)


def host_memory(size: int, device: torch.device) -> torch.Tensor:
    """Return uint8 [size] in host memory, for copies from and to a device.

    Beside a GPU it is pinned, and a whole power of two is asked for, which torch's pool of pinned memory gives anyway.
    Where no more can be pinned (in WSL after 0.5 to 1 GiB: microsoft/WSL issue 14078, nvidia-docker issue 1725), it is
    ordinary memory: the same copies, slower. On Windows the refusal stays behind as CUDA's last error, which the next
    kernel raises as its own (MakazhanAlpamys/Soup issue 901), so a kernel without a purpose is run first.
    """
    taken = pinned_bytes(size) if device_type(device) == "cuda" else size
    host = device if device.type == "meta" else torch.device("cpu")  # a plan's tensors have no memory at all
    with category("offloaded"):
        if device.type == "cuda":
            try:
                return torch.empty(taken, dtype=torch.uint8, pin_memory=True)[:size]
            except RuntimeError as error:
                if not any(words in str(error) for words in REFUSALS):  # an earlier fault of the GPU, which shows here
                    raise
                with suppress(RuntimeError):  # of the refusal, which the next kernel raises again (torch on Windows)
                    torch.ones(1, device=device)
                _say_not_pinned(str(error).partition("\n")[0])
        return torch.empty(taken, dtype=torch.uint8, device=host)[:size]


def pinned_bytes(size: int) -> int:
    """Return what torch's pool of pinned memory takes for so many bytes."""
    return 1 << (size - 1).bit_length()


@cache
def _say_not_pinned(reason: str) -> None:
    log.warning(
        "host memory cannot be pinned any more (%s): copies between it and the GPU take longer, and are not hidden "
        "behind the computation; fewer weights or block inputs in host memory may be faster",
        reason,
    )


def disk_memory(size: int, folder: str, device: torch.device, setting: str = "memory.offload_folder") -> torch.Tensor:
    """Return uint8 [size] in a file without a name, which is gone when nobody holds the tensor, or the process ends.

    Raises:
        OutputError: naming the setting; the folder is not there, cannot be written to, or its disk has no room.
    """
    with category("on disk"):
        if device.type == "meta":
            return torch.empty(size, dtype=torch.uint8, device=device)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a disk that is full later would kill the process
                    os.posix_fallocate(file.fileno(), 0, size)
                memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutputError(
                f"{setting}: {format_bytes(size)} cannot be taken in {folder}: {error.strerror}; choose "
                "another folder, or make room"
            ) from error
        return torch.frombuffer(memory, dtype=torch.uint8)[:]  # an operation, which a ledger sees


class SideStream:
    """A stream for copies beside the computation; on a device without streams, copies just happen."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @category("offloaded")  # no tensor is born here; the mark tells a ``WorkCounter`` what takes the bus
    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> "torch.cuda.Event | None":
        """Copy each (target, source) after what the computation was given so far; return what to wait for."""

        def copy() -> None:
            for target, source in pairs:
                target.copy_(source, non_blocking=self.stream is not None)

        return self.launch(copy)

    def launch(self, action: Callable[[], None]) -> "torch.cuda.Event | None":
        """Do what moves data after what the computation was given so far; return what to wait for."""
        if self.stream is None:
            action()
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            action()
            return self.stream.record_event()

    def wait(self, event: "torch.cuda.Event | None") -> None:
        """Let the computation go on only after a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def wait_on_host(self, event: "torch.cuda.Event | None") -> None:
        """Return when a copy has ended, after which the host may write to what it read."""
        if event is not None:
            event.synchronize()


class Arrival(NamedTuple):
    """Tensors on the device, the block or rows that they are, and the end of their copy (None: nothing to wait for)."""

    of: int | slice
    tensors: list[torch.Tensor]
    event: "torch.cuda.Event | None"


class _Form(NamedTuple):
    """What a tensor looks like whose values lie in host memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> torch.Tensor:
        """Return memory for the tensor."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


class _Stored(NamedTuple):
    """Where a block's tensors lie in host memory, in bytes from its begin, and what they look like."""

    start: int
    stop: int
    forms: list[_Form]


class HostStore:
    """Tensors of numbered blocks in host memory, put in rising order from 0 and taken back in falling order.

    They lie there as a stack, each block's behind those of the block before: no more is taken than the most that was
    there at one time needs, whatever a block's own size is in each step. One stream makes all copies in their order, so
    that what comes back has been read before others are written to its place.

    Args:
        device: where they come from and return to.
        folder: on a disk, where they lie instead.
    """

    def __init__(self, device: torch.device, folder: str | None = None):
        self.side, self.folder = SideStream(device), folder
        self._parts: list[torch.Tensor] = []  # of the memory, one behind the other
        self._begins = [0]  # of the parts, in bytes from that of the first, and of what would be the next
        self._stored: dict[int, _Stored] = {}
        self._leaving: Arrival | None = None  # of the block that was put last
        self._coming: dict[int, Arrival] = {}

    def put(self, number: int, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a block's tensors to the host; they stay on the device until the next block's are put."""
        self._let_go()
        if number in self._stored:  # of a step that broke off
            self._stored.clear()
        tensors = [_dense(tensor.detach()) for tensor in tensors]
        start = next(reversed(self._stored.values())).stop if self._stored else 0
        size = sum(tensor.nbytes for tensor in tensors)
        stop = start + (sum(part_sizes(size)) if self.folder is None else size)
        self._make_room(stop)
        forms = [_Form(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        self._stored[number] = _Stored(start, stop, forms)
        self._leaving = Arrival(number, tensors, self.side.copy(list(self._pairs(start, tensors))))

    def _make_room(self, stop: int) -> None:
        missing, device = stop - self._begins[-1], self.side.device
        if self.folder is None:
            self._add(host_memory(part, device) for part in part_sizes(missing))
        elif missing > 0:
            self._add([disk_memory(missing, self.folder, device)])

    def _add(self, parts: Iterable[torch.Tensor]) -> None:
        for part in parts:
            self._parts.append(part)
            self._begins.append(self._begins[-1] + len(part))

    def _let_go(self) -> None:
        """Drop what is on the device, and have the computation wait for its copies before it reuses the memory."""
        for arrival in (*self._coming.values(), *([self._leaving] if self._leaving else [])):
            self.side.wait(arrival.event)
        self._leaving = None
        self._coming.clear()  # empty, unless a step broke off

    def take(self, number: int) -> list[torch.Tensor]:
        """Return a block's tensors on the device, and begin to bring those of the block before it."""
        if self._leaving is not None and self._leaving.of == number:  # the last block's never left
            here, self._leaving = self._leaving, None
            del self._stored[number]
        else:
            here = self._coming.pop(number, None) or self._bring(number)
        self.side.wait(here.event)  # before there may be no memory for the next one, and this one be dropped
        if number - 1 in self._stored:
            self._coming[number - 1] = self._bring(number - 1)
        return here.tensors

    def _bring(self, number: int) -> Arrival:
        stored = self._stored.pop(number)
        with category("saved activations"):
            tensors = [form.empty(self.side.device) for form in stored.forms]
        pairs = [(target, source) for source, target in self._pairs(stored.start, tensors)]
        return Arrival(number, tensors, self.side.copy(pairs))

    def _pairs(self, start: int, tensors: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pair host memory from a place on with tensors on the device, as bytes, cut where a part or a tensor ends."""
        number = bisect_right(self._begins, start) - 1  # of the part that it lies in
        parts, part, skipped = iter(self._parts[number:]), (), start - self._begins[number]
        for tensor in tensors:
            flat = _flat(tensor)
            while len(flat):
                if not len(part):
                    part, skipped = next(parts)[skipped:], 0
                size = min(len(part), len(flat))
                yield part[:size], flat[:size]
                part, flat = part[size:], flat[size:]


def part_sizes(size: int) -> Iterator[int]:
    """Yield at most ``MAX_PARTS`` powers of two that together are ``size`` or a little more; none for 0 or less."""
    for number in range(1, MAX_PARTS + 1):
        if size > 0:
            part = 1 << (size - 1).bit_length() if number == MAX_PARTS else 1 << size.bit_length() - 1
            yield part
            size -= part


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose memory has no gaps: itself, or a copy."""
    return tensor if _in_memory(tensor).is_contiguous() else tensor.contiguous()


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view with the dimensions in the order in which they lie in memory."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without gaps as uint8 in the order of its memory."""
    return _in_memory(tensor).view(-1).view(torch.uint8)
