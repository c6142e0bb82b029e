"""The peak of memory held, between two moments.

On a CUDA GPU: the allocator's own counter. Elsewhere: the process's anonymous memory, sampled from
``/proc/self/status`` by a thread (file pages of memory-mapped weights can be dropped by the kernel at any
time and are not counted); without ``/proc``, what belongs to the process alone on Windows, and its resident set on
macOS, file pages included.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch

from .process import ALLOCATOR_VARIABLES, CUDA_CONTEXT_BYTES, GROWING, KERNEL_CACHES, KERNELS_KEPT, segments_grow

SAMPLE_SECONDS = 0.01
_STATUS, _PAGES = Path("/proc/self/status"), Path("/proc/self/smaps")
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CGROUP_NAMES = {  # of a group's limit and use, and in its memory.stat of the file pages that can be dropped; by root
    ".": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def held_bytes(device: torch.device) -> int:
    """Return the bytes held now: allocated on the GPU, or anonymous memory of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if (status := _STATUS).exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    found = psutil.Process().memory_info()
    return getattr(found, "private", found.rss)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a process could still take: free on the GPU, or available here within its limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield what the limit of a container, a batch system's job or a service leaves, and of each group around it."""
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.exists() else []
    paths = {kinds: path.lstrip("/") for _, kinds, path in (line.split(":", 2) for line in lines)}  # "" is version 2's
    for root, (limit, used, droppable) in _CGROUP_NAMES.items():
        own = Path(paths.get(root.strip("."), ""))  # where a container hides it, the root is that group
        for group in (_CGROUPS / root / part for part in (own, *own.parents)):
            if (group / limit).exists() and (text := (group / limit).read_text().strip()).isdigit():
                stat = group / "memory.stat"
                found = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
                yield int(text) - int((group / used).read_text()) + int(found.get(droppable, 0))


def use_device(device: torch.device) -> None:
    """Make a GPU the current one, on which Triton, bitsandbytes and a CUDA graph start their kernels."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def grow_segments(device: torch.device) -> None:
    """Have the allocator of a GPU take memory in segments that grow, so that fewer holes are left between tensors.

    Where the user has set the allocator up (PYTORCH_ALLOC_CONF), it stays so.
    """
    if device.type == "cuda" and segments_grow() and not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings(GROWING)  # torch 2.13 has no public function for it


def keep_few_kernels(device: torch.device) -> None:
    """Have a CPU's kernels for batches of other lengths thrown away, the oldest first, as soon as there are many.

    Their caches read it at their first product: call it before. What the user has set stays so.
    """
    if device.type == "cpu":
        for name in KERNEL_CACHES:
            os.environ.setdefault(name, str(KERNELS_KEPT))


def set_memory_limit(device: torch.device, budget_bytes: int | None) -> None:
    """Let this process take at most a budget of a GPU, its context included, and never more than is free now.

    Some drivers (WSL's) answer who asks for more than there is with memory of the host, many times slower, and with no
    error.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        most = free_bytes(device) + torch.cuda.memory_reserved(device)
        if budget_bytes is not None:
            most = min(most, budget_bytes - CUDA_CONTEXT_BYTES)
        torch.cuda.set_per_process_memory_fraction(min(max(0.0, most / total), 1.0), device)


def mapped_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors that are file pages (weights mapped from disk), which no process memory is for.

    A page that was written to is the process's own, unless the file is shared: of a mapping, what tensors have at most
    is what was not.
    """
    if not _PAGES.exists():
        return 0
    files: list[list[int]] = []  # start and end of mappings, and what of each was not written to
    for line in (text.split(maxsplit=5) for text in _PAGES.read_text().splitlines()):
        if not line[0].endswith(":"):
            start, end = (int(number, 16) for number in line[0].split("-"))
            files.append([start, end, end - start if len(line) > 5 and line[4] != "0" else 0])
        elif line[0] == "Anonymous:":
            files[-1][2] = max(0, files[-1][2] - int(line[1]) * 1024)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    sizes = [sum(size for place, size in storages.items() if start <= place < end) for start, end, _ in files]
    return sum(min(size, unwritten) for size, (_, _, unwritten) in zip(sizes, files, strict=True))


class PeakMeter:
    """Follow the peak of held memory from construction on, on a GPU from that of the newest meter of all.

    Use as a context manager, or call ``close`` to end the sampling thread.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.restart()
        self._stop = threading.Event()
        self._thread = None
        if self.device.type != "cuda":
            self._thread = threading.Thread(target=self._sample, name="memory-meter", daemon=True)
            self._thread.start()

    def restart(self) -> None:
        """Forget the peak so far."""
        self._peak = held_bytes(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            held = held_bytes(self.device)  # takes a while, in which the peak may be forgotten
            self._peak = max(self._peak, held)

    def peak_bytes(self) -> int:
        """Return the largest number of bytes held since then."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        self._peak = max(self._peak, held_bytes(self.device))
        return self._peak

    def allocation_retries(self) -> int:
        """Return how often a GPU had no room for a tensor until cached memory was given back; 0 on a CPU."""
        return torch.cuda.memory_stats(self.device)["num_alloc_retries"] if self.device.type == "cuda" else 0

    def close(self) -> None:
        """End the sampling thread."""
        self._stop.set()
        if self._thread not in (None, threading.current_thread()):  # which may collect what holds this meter
            self._thread.join()

    def __enter__(self) -> "PeakMeter":
        return self

    def __exit__(self, *_error) -> None:
        self.close()
