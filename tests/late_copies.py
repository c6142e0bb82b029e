"""A GPU's copies on a CPU: each begins as early and ends as late as it may, so that a wait that is missing shows.

On a GPU, a copy on a side stream may begin at once, and has certainly ended only for a computation that waited for it.
In between, its target holds anything, and its source and both their memories must stay as they are. ``LateCopies``
takes all of that at its worst: the target is poisoned at once, and the copy is made in the moment of the wait.

What it cannot show: that the side stream waits for the computation before a copy begins, since here the computation is
always done by then; and copies from and to memory that is not pinned, which on a GPU end sooner than here.
"""

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakSet

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_lite.offload.offload import SideStream, disk_memory, host_memory

POISON = 0xFF  # in every byte: NaN of any floating type, -1 of any integer


class _Late(NamedTuple):
    """A copy that has not ended, by address: it keeps nothing alive."""

    target: int
    source: int
    size: int
    storages: tuple[StorageWeakRef, StorageWeakRef]  # the target's and the source's


class LateCopies(SideStream):
    """A side stream between CPU tensors whose copies are made when they are waited for, in the order of their begin.

    Args:
        device: the CPU.
        host: storages that stand for pinned memory; the list may grow.
    """

    def __init__(self, device: torch.device, host: list[StorageWeakRef]):
        assert device.type == "cpu"
        self.device, self.stream, self.host = device, "late", host
        self.begun = 0  # copies so far: an event is this number
        self._waiting: deque[_Late] = deque()

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
        for target, source in pairs:
            assert target.is_contiguous() and source.is_contiguous() and target.nbytes == source.nbytes
            storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in (target, source))
            begin, end = target.data_ptr(), target.data_ptr() + target.nbytes
            if all(end <= late.source or late.source + late.size <= begin for late in self._waiting):
                # or else those that read it come first
                target.view(torch.uint8).fill_(POISON)  # counted by autograd as ``copy_`` is
            self._waiting.append(_Late(target.data_ptr(), source.data_ptr(), target.nbytes, storages))
            self.begun += 1
        return self.begun

    def wait(self, event: int | None) -> None:
        """Make all copies up to an event.

        Raises:
            AssertionError: the memory of one was given back before (the host's too, which ``finish`` allows).
        """
        while event is not None and self.begun - len(self._waiting) < event:
            late = self._waiting.popleft()
            assert not any(storage.expired() for storage in late.storages), "memory was given back before its copy"
            ctypes.memmove(late.target, late.source, late.size)

    wait_on_host = wait

    def finish(self) -> None:
        """Check the copies that nobody waited for.

        A host's memory may be gone: torch's pool of pinned memory does not give it to others before the copy has ended.

        Raises:
            AssertionError: device memory was given back, which the GPU may still read or write.
        """
        gone = (storage for late in self._waiting for storage in late.storages if storage.expired())
        assert all(storage in self.host for storage in gone), "memory was given back, and nobody waited for its copy"


@contextmanager
def copies_end_late() -> Iterator[None]:
    """Put ``LateCopies`` in the place of side streams, and check at the end that copies were made, and well.

    What ``host_memory`` and ``disk_memory`` give stands for the host's; any other tensor is taken for the device's. Of
    a model that was given up nothing is checked: it may have begun to bring what nobody asks for any more.
    """
    streams, host, copies = WeakSet(), [], 0

    class Counted(LateCopies):
        def copy(self, pairs):
            nonlocal copies
            copies += len(pairs)
            return super().copy(pairs)

    def side_stream(device):
        stream = Counted(device, host)
        streams.add(stream)
        return stream

    def noted(take):
        def taken(*args):
            memory = take(*args)
            host.append(StorageWeakRef(memory.untyped_storage()))
            return memory

        return taken

    with pytest.MonkeyPatch.context() as patch:
        for module in ("offload.offload", "offload.stream", "models.host_tables"):
            patch.setattr(f"qlora_lite.{module}.SideStream", side_stream)
        for module in ("offload", "stream", "gradients"):
            patch.setattr(f"qlora_lite.offload.{module}.host_memory", noted(host_memory))
        patch.setattr("qlora_lite.offload.offload.disk_memory", noted(disk_memory))
        yield
    assert copies, "there was no copy"
    for stream in streams:
        stream.finish()
